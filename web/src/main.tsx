import { render } from "preact";
import { Router } from "./address";
import { App } from "./app";
import { FileSource } from "./file";
import { LiveSource } from "./live";

const root = document.getElementById("app")!;
root.textContent = "";
// In a frame of another page, only what is looked at.
document.documentElement.classList.toggle("embed", new URLSearchParams(location.search).get("embed") === "1");
const source = FileSource.isHere() ? new FileSource() : new LiveSource();
render(<App source={source} router={new Router()} />, root);
