import { render } from "preact";
import { Router } from "./address";
import { App } from "./app";
import { FileSource } from "./file";
import { LiveSource } from "./live";

const root = document.getElementById("app")!;
root.textContent = "";
const source = FileSource.isHere() ? new FileSource() : new LiveSource();
render(<App source={source} router={new Router()} />, root);
