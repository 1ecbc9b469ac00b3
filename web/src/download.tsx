// Files for the user. A frame without rights can offer none; then there is a box with the text.
import { useEffect, useRef } from "preact/hooks";
import { canStore } from "./storage";

/** A frame without rights has no storage, either. Nothing else tells that it may not offer files. */
const canOffer = (): boolean => self === top || canStore();

/** Offer a file; false if that is not possible here. */
export function offer(name: string, content: Blob): boolean {
  if (!canOffer()) return false;
  const link = document.createElement("a");
  link.href = URL.createObjectURL(content);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
  return true;
}

/** A text to be copied, selected. */
export function Fallback({ name, text }: { name: string; text: string }) {
  const box = useRef<HTMLTextAreaElement>(null);
  useEffect(() => box.current?.select(), [text]);
  return (
    <textarea ref={box} class="fallback" readOnly rows={4} aria-label={`${name}, to be copied`} value={text} />
  );
}
