import { render } from "preact";
import { Router } from "./address";
import { App } from "./app";
import { FileSource } from "./file";

const root = document.getElementById("app")!;
root.textContent = "";
render(<App source={new FileSource()} router={new Router()} />, root);
