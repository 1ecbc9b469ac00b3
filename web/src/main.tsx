import { render } from "preact";
import { App } from "./app";
import { readRuns } from "./data";
import { Router } from "./route";

const root = document.getElementById("app")!;
const runs = readRuns();
root.textContent = "";
render(<App runs={runs} router={new Router()} />, root);
