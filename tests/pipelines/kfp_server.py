"""KFP's API over HTTP, with state, in which every request and answer must fit the swagger file.

What it does beyond the file is what the 2.17 backend's source does: names are unique, a single-user
API takes no namespace, filters and page tokens work, tasks are the nodes of an Argo workflow.
"""

import collections.abc
import contextlib
import datetime
import email.parser
import email.policy
import http.server
import json
import re
import socket
import ssl
import threading
import time
import typing as tp
import urllib.parse
import uuid

import yaml
from google.protobuf import json_format
from kfp.pipeline_spec import pipeline_spec_pb2
from swagger import Operation, Swagger, ViolationError

_SWAGGER = Swagger()
_GRPC = {400: 3, 401: 16, 403: 7, 404: 5, 409: 6, 500: 13}
_LOG = re.compile(r"/apis/v1alpha1/runs/[^/]+/nodes/(?P<node>[^/]+)/log")
"""Not in the swagger file, but in the backend's source."""
NEVER = "0001-01-01T00:00:00Z"


class Refusal(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status, self.message = status, message


class Fault(tp.NamedTuple):
    """What goes wrong with requests that match."""

    method: str
    path: re.Pattern[str]
    answer: tp.Callable[["_Handler"], None]
    times: list[int]
    """How often it still happens; negative is for ever."""


class KfpServer:
    """The server's state, and what tests do to it."""

    def __init__(self, multi_user: bool = False):
        self.multi_user = multi_user
        self.experiments: list[dict[str, tp.Any]] = []
        self.pipelines: list[dict[str, tp.Any]] = []
        self.versions: list[dict[str, tp.Any]] = []
        self.runs: list[dict[str, tp.Any]] = []
        self.recurring: list[dict[str, tp.Any]] = []
        self.scripts: dict[str, list[dict[str, tp.Any]]] = {}
        """run id → what successive looks at it add to it; the last stays."""
        self.script: list[dict[str, tp.Any]] = []
        """The same for runs that are started."""
        self.on_start: tp.Callable[[str], None] = lambda run_id: None
        """Is told the id of a run that is started."""
        self.kept: dict[str, str] = {}
        """Id of Argo's node → its archived log."""
        self.killed: list[str] = []
        """Names of runs whose Workflows were deleted with their schedule."""
        self.violations: list[str] = []
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        """Method, path and headers (names in small letters) of every request."""
        self.faults: list[Fault] = []
        self.lock = threading.RLock()
        self.url = ""
        self._seconds = 0

    def fail(
        self, path: str, status: int, message: str = "no", *, times: int = -1, method: str = ".*"
    ) -> None:
        """Answer requests to a path (a regular expression) with an error."""
        body = {"error": message, "code": _GRPC.get(status, 2), "message": message, "details": []}
        self._fault(method, path, lambda h: h.answer(status, body), times)

    def answer_html(self, path: str, status: int = 200, *, times: int = -1) -> None:
        """Answer with a login page."""
        self._fault(".*", path, lambda h: h.answer_text(status, "<html>Log in</html>"), times)

    def answer_other(self, path: str, kind: str, text: str, status: int = 200) -> None:
        """Answer as some other server does."""
        self._fault(".*", path, lambda h: h.send(status, kind, text.encode()), -1)

    def redirect(self, path: str) -> None:
        """Send requests to a login page, as dex and IAP do."""

        def answer(handler: "_Handler") -> None:
            handler.send_response(302)
            handler.send_header("Location", f"{self.url}/dex/auth")
            handler.send_header("Content-Length", "0")
            handler.end_headers()

        self._fault(".*", path, answer, -1)
        self.answer_html("/dex/auth")

    def hang(self, path: str, seconds: float, *, times: int = -1) -> None:
        """Answer, but only after a while."""

        def answer(handler: "_Handler") -> None:
            time.sleep(seconds)
            handler.close_connection = True

        self._fault(".*", path, answer, times)

    def drop(self, path: str, *, times: int = -1) -> None:
        """Close the connection without an answer."""

        def answer(handler: "_Handler") -> None:
            handler.connection.shutdown(socket.SHUT_RDWR)
            handler.close_connection = True

        self._fault(".*", path, answer, times)

    def _fault(self, method: str, path: str, answer: tp.Callable[..., None], times: int) -> None:
        self.faults.append(Fault(method, re.compile(path), answer, [times]))

    def now(self) -> str:
        """A time, a second later each time, so that order is certain."""
        self._seconds += 1
        start = datetime.datetime.now(datetime.UTC) - datetime.timedelta(minutes=10)
        time_ = start + datetime.timedelta(seconds=self._seconds)
        return time_.strftime("%Y-%m-%dT%H:%M:%SZ")

    def add_run(self, name: str, state: str = "SUCCEEDED", **fields: tp.Any) -> dict[str, tp.Any]:
        """A run that somebody else started."""
        made = self.now()
        run = {
            "run_id": str(uuid.uuid4()),
            "display_name": name,
            "experiment_id": "e",
            "state": state,
            "created_at": made,
            "finished_at": self.now() if state in ("SUCCEEDED", "FAILED", "CANCELED") else NEVER,
            "runtime_config": {"parameters": {"dataset": f"s3://bucket/{name}"}},
            **fields,
        }
        self.runs.append(run)
        return run

    def end(self, run_id: str, *states: str) -> None:
        """End a run, in these states one after the other."""
        run = next(run for run in self.runs if run["run_id"] == run_id)
        for state in states:
            entry = {"state": state, "update_time": self.now()}
            run.setdefault("state_history", []).append(entry)
        run.update(state=states[-1], finished_at=self.now())


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are two writes
    state: KfpServer

    def log_message(self, *args: tp.Any) -> None: ...

    def do_GET(self) -> None:
        self._handle()

    do_POST = do_DELETE = do_PATCH = do_PUT = do_GET

    def _handle(self) -> None:
        state, parts = self.state, urllib.parse.urlsplit(self.path)
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        headers = {key.lower(): value for key, value in self.headers.items()}
        with state.lock:
            state.requests.append((self.command, self.path, headers))
        for fault in state.faults:
            if (
                fault.times[0]
                and re.fullmatch(fault.method, self.command)
                and fault.path.search(parts.path)
            ):
                fault.times[0] -= 1
                fault.answer(self)
                return
        if found := _LOG.fullmatch(parts.path):
            return self._log(found["node"])
        try:
            operation = _SWAGGER.operation(self.command, parts.path)
            query = urllib.parse.parse_qs(
                parts.query, keep_blank_values=True, strict_parsing=bool(parts.query)
            )
            _SWAGGER.check_query(operation, query)
            body = self._body(operation, raw)
            with state.lock:
                flat = {key: values[0] for key, values in query.items()}
                answer = _OPERATIONS[operation.name](state, operation.in_path, flat, body)
            _SWAGGER.check(answer, operation.schema, f"answer of {operation.name}")
            self.answer(200, answer)
        except Refusal as err:
            self.answer(
                err.status,
                {"error": err.message, "code": _GRPC[err.status], "message": err.message},
            )
        except (ViolationError, ValueError, KeyError) as err:
            state.violations.append(f"{self.command} {self.path}: {err!r}")
            self.answer(400, {"message": f"swagger: {err}", "code": 3})

    def _log(self, node: str) -> None:
        """As the backend does: the answer is a success before it knows of one."""
        error = {"error_message": "Failed to read logs", "error_details": "…"}
        self.send(200, "text/plain", self.state.kept.get(node, json.dumps(error)).encode())

    def _body(self, operation: Operation, raw: bytes) -> tp.Any:
        kind = self.headers.get("Content-Type", "")
        if "uploadfile" in operation.parameters:
            if not kind.startswith("multipart/form-data"):
                raise ViolationError(f"{operation.name} wants multipart/form-data, got {kind!r}")
            return _upload(kind, raw)
        if not raw:
            _SWAGGER.check_body(operation, None)
            return None
        if not kind.startswith("application/json"):
            raise ViolationError(f"{operation.name} wants JSON, got {kind!r}")
        body = json.loads(raw)
        _SWAGGER.check_body(operation, body)
        return body

    def answer(self, status: int, body: tp.Any) -> None:
        self.send(status, "application/json", json.dumps(body).encode())

    def answer_text(self, status: int, text: str) -> None:
        self.send(status, "text/html; charset=utf-8", text.encode())

    def send(self, status: int, kind: str, data: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        with contextlib.suppress(OSError):  # a client that has given up
            self.wfile.write(data)


def _upload(kind: str, raw: bytes) -> dict[str, tp.Any]:
    """The compiled pipeline in a form, parsed as the backend does. Returns it as the API has it."""
    parser = email.parser.BytesParser(policy=email.policy.HTTP)
    form = parser.parsebytes(b"Content-Type: " + kind.encode() + b"\r\n\r\n" + raw)
    parts = list(form.iter_parts())
    if [part.get_param("name", header="content-disposition") for part in parts] != ["uploadfile"]:
        raise ViolationError("the form has other fields than uploadfile")
    name = parts[0].get_filename() or ""
    if not name.endswith((".yaml", ".zip", ".tar.gz")):
        raise ViolationError(f"the backend does not read files called {name!r}")
    spec, platform = yaml.load_all(parts[0].get_payload(decode=True), yaml.CSafeLoader)
    json_format.ParseDict(spec, pipeline_spec_pb2.PipelineSpec())
    json_format.ParseDict(platform, pipeline_spec_pb2.PlatformSpec())
    return {"pipeline_spec": spec, "platform_spec": platform}


# --- Operations --------------------------------------------------------------------------------

Path = Query = dict[str, str]


def _namespace(state: KfpServer, value: str) -> str:
    """The backend's rules: who is alone names no namespace, others must."""
    if state.multi_user and not value:
        raise Refusal(400, "Namespace is empty. Please specify a valid namespace")
    if not state.multi_user and value:
        raise Refusal(400, "In single-user mode, namespace cannot be specified")
    return value


def _matching(items: list[dict[str, tp.Any]], query: Query) -> list[dict[str, tp.Any]]:
    """Apply filter and sort_by."""
    for predicate in json.loads(query.get("filter") or "{}").get("predicates", []):
        operation, key, value = (predicate[k] for k in ("operation", "key", "string_value"))
        assert operation in ("EQUALS", "NOT_EQUALS")
        items = [item for item in items if (item.get(key) == value) == (operation == "EQUALS")]
    if sort := query.get("sort_by"):
        key, _, order = sort.partition(" ")
        items = sorted(items, key=lambda item: item[key], reverse=order == "desc")
    return items


def _page(items: list[dict[str, tp.Any]], query: Query, name: str) -> dict[str, tp.Any]:
    found = _matching(items, query)
    start, size = int(query.get("page_token") or 0), int(query.get("page_size") or 10)
    answer: dict[str, tp.Any] = {"total_size": len(found)}
    if found:
        answer[name] = found[start : start + size]
    if start + size < len(found):
        answer["next_page_token"] = str(start + size)
    return answer


def _in_namespace(state: KfpServer, items: list[dict[str, tp.Any]], query: Query) -> list[tp.Any]:
    namespace = _namespace(state, query.get("namespace", ""))
    return [item for item in items if item.get("namespace", "") == namespace]


def _one(items: list[dict[str, tp.Any]], key: str, value: str, what: str) -> dict[str, tp.Any]:
    for item in items:
        if item[key] == value:
            return item
    raise Refusal(404, f"{what} {value} not found")


def _new(state: KfpServer, items: list[tp.Any], body: tp.Any, key: str, what: str) -> tp.Any:
    name, namespace = body["display_name"], body.get("namespace", "")
    if any((i["display_name"], i.get("namespace", "")) == (name, namespace) for i in items):
        raise Refusal(409, f"{what} {name} already exists")
    made = {**body, key: str(uuid.uuid4()), "created_at": state.now()}
    items.append(made)
    return made


def _health(state: KfpServer, path: Path, query: Query, body: tp.Any) -> tp.Any:
    return {"multi_user": True} if state.multi_user else {}


def _list_experiments(state: KfpServer, path: Path, query: Query, body: tp.Any) -> tp.Any:
    return _page(_in_namespace(state, state.experiments, query), query, "experiments")


def _create_experiment(state: KfpServer, path: Path, query: Query, body: tp.Any) -> tp.Any:
    _namespace(state, body.get("namespace", ""))
    return _new(state, state.experiments, body, "experiment_id", "Experiment")


def _list_pipelines(state: KfpServer, path: Path, query: Query, body: tp.Any) -> tp.Any:
    return _page(_in_namespace(state, state.pipelines, query), query, "pipelines")


def _create_pipeline(state: KfpServer, path: Path, query: Query, body: tp.Any) -> tp.Any:
    return _new(state, state.pipelines, body, "pipeline_id", "Pipeline")


def _list_versions(state: KfpServer, path: Path, query: Query, body: tp.Any) -> tp.Any:
    _one(state.pipelines, "pipeline_id", path["pipeline_id"], "Pipeline")
    mine = [v for v in state.versions if v["pipeline_id"] == path["pipeline_id"]]
    return _page(mine, query, "pipeline_versions")


def _upload_version(state: KfpServer, path: Path, query: Query, body: tp.Any) -> tp.Any:
    pipeline = query["pipelineid"]
    _one(state.pipelines, "pipeline_id", pipeline, "Pipeline")
    mine = [v for v in state.versions if v["pipeline_id"] == pipeline]
    made = _new(
        state,
        mine,
        {"display_name": query["name"], "pipeline_id": pipeline, "pipeline_spec": body},
        "pipeline_version_id",
        "Pipeline version",
    )
    state.versions.append({**made, "description": query.get("description", "")})
    return state.versions[-1]


def _check_start(state: KfpServer, body: dict[str, tp.Any]) -> None:
    """What the backend refuses: unknown versions and experiments, missing or unknown parameters."""
    _one(state.experiments, "experiment_id", body["experiment_id"], "Experiment")
    if "pipeline_spec" in body:  # not uploaded: both documents of the compiled file
        both = body["pipeline_spec"]
        json_format.ParseDict(both["pipeline_spec"], pipeline_spec_pb2.PipelineSpec())
        json_format.ParseDict(both["platform_spec"], pipeline_spec_pb2.PlatformSpec())
    else:
        version = body["pipeline_version_reference"]["pipeline_version_id"]
        both = _one(state.versions, "pipeline_version_id", version, "Version")["pipeline_spec"]
    wanted = both["pipeline_spec"]["root"]["inputDefinitions"]["parameters"]
    given = body["runtime_config"]["parameters"]
    for name, parameter in wanted.items():
        if (
            "defaultValue" not in parameter
            and not parameter.get("isOptional")
            and name not in given
        ):
            raise Refusal(400, f"parameter {name} is missing")
    for name in given:
        if name not in wanted:
            raise Refusal(400, f"parameter {name} is not an input of the pipeline")


def _create_run(state: KfpServer, path: Path, query: Query, body: tp.Any) -> tp.Any:
    _check_start(state, body)
    run = {**body, "run_id": str(uuid.uuid4()), "state": "PENDING", "created_at": state.now()}
    run["finished_at"] = NEVER
    state.runs.append(run)
    state.scripts[run["run_id"]] = list(state.script)
    state.on_start(run["run_id"])
    return run


def _list_runs(state: KfpServer, path: Path, query: Query, body: tp.Any) -> tp.Any:
    experiment = query.get("experiment_id")
    if experiment:
        mine = [run for run in state.runs if run["experiment_id"] == experiment]
        return _page(mine, query, "runs")
    _namespace(state, query.get("namespace", ""))
    return _page(state.runs, query, "runs")


def _get_run(state: KfpServer, path: Path, query: Query, body: tp.Any) -> tp.Any:
    run = _one(state.runs, "run_id", path["run_id"], "Run")
    script = state.scripts.get(path["run_id"])
    if script:
        run.update(script[0])
        if len(script) > 1:
            script.pop(0)
    return run


def _terminate(state: KfpServer, path: Path, query: Query, body: tp.Any) -> tp.Any:
    _one(state.runs, "run_id", path["run_id"], "Run")["state"] = "CANCELING"
    return {}


def _retry(state: KfpServer, path: Path, query: Query, body: tp.Any) -> tp.Any:
    """As resource_manager.go, RetryRun: pods that did not succeed run again, in the same run."""
    run = _one(state.runs, "run_id", path["run_id"], "Run")
    if run["state"] != "FAILED":
        raise Refusal(500, "Workflow must be Failed/Error to retry")
    run.update(state="RUNNING", finished_at=NEVER)
    run.setdefault("state_history", []).append({"state": "RUNNING", "update_time": state.now()})
    return {}


def _list_recurring(state: KfpServer, path: Path, query: Query, body: tp.Any) -> tp.Any:
    _namespace(state, query.get("namespace", ""))
    return _page(state.recurring, query, "recurringRuns")


def _create_recurring(state: KfpServer, path: Path, query: Query, body: tp.Any) -> tp.Any:
    _check_start(state, body)
    made = {
        **body,
        "recurring_run_id": str(uuid.uuid4()),
        "status": "ENABLED" if body["mode"] == "ENABLE" else "DISABLED",
        "created_at": state.now(),
    }
    state.recurring.append(made)
    return made


def _disable_recurring(state: KfpServer, path: Path, query: Query, body: tp.Any) -> tp.Any:
    item = _one(state.recurring, "recurring_run_id", path["recurring_run_id"], "Recurring run")
    item["status"] = "DISABLED"
    return {}


def _delete_recurring(state: KfpServer, path: Path, query: Query, body: tp.Any) -> tp.Any:
    """It owns the Workflows of its runs: they go with it, and the runs' states stay as they are."""
    item = _one(state.recurring, "recurring_run_id", path["recurring_run_id"], "Recurring run")
    state.recurring.remove(item)
    for run in state.runs:
        is_mine = run.get("recurring_run_id") == item["recurring_run_id"]
        if is_mine and run["state"] in ("PENDING", "RUNNING", "CANCELING", "PAUSED"):
            state.killed.append(run["display_name"])
    return {}


def _delete(collection: str, key: str, what: str) -> tp.Callable[..., tp.Any]:
    def delete(state: KfpServer, path: Path, query: Query, body: tp.Any) -> tp.Any:
        items = getattr(state, collection)
        items.remove(_one(items, key, path[key], what))
        return {}

    return delete


_OPERATIONS: dict[str, tp.Callable[[KfpServer, Path, Query, tp.Any], tp.Any]] = {
    "HealthzService_GetHealthz": _health,
    "ExperimentService_ListExperiments": _list_experiments,
    "ExperimentService_CreateExperiment": _create_experiment,
    "PipelineService_ListPipelines": _list_pipelines,
    "PipelineService_CreatePipeline": _create_pipeline,
    "PipelineService_ListPipelineVersions": _list_versions,
    "UploadPipelineVersion": _upload_version,
    "RunService_CreateRun": _create_run,
    "RunService_ListRuns": _list_runs,
    "RunService_GetRun": _get_run,
    "RunService_TerminateRun": _terminate,
    "RunService_RetryRun": _retry,
    "RecurringRunService_ListRecurringRuns": _list_recurring,
    "RecurringRunService_CreateRecurringRun": _create_recurring,
    "RecurringRunService_DisableRecurringRun": _disable_recurring,
    "RecurringRunService_DeleteRecurringRun": _delete_recurring,
    "RunService_DeleteRun": _delete("runs", "run_id", "Run"),
    "ExperimentService_DeleteExperiment": _delete("experiments", "experiment_id", "Experiment"),
    "PipelineService_DeletePipeline": _delete("pipelines", "pipeline_id", "Pipeline"),
    "PipelineService_DeletePipelineVersion": _delete(
        "versions", "pipeline_version_id", "Pipeline version"
    ),
}


# --- Tasks as Argo's nodes ---------------------------------------------------------------------


def task(name: str, state: str, message: str = "") -> dict[str, tp.Any]:
    """One node of the workflow."""
    over = state in ("SUCCEEDED", "FAILED", "SKIPPED")
    node: dict[str, tp.Any] = {
        "task_id": str(uuid.uuid4()),
        "display_name": name,
        "state": state,
        "start_time": "2026-11-25T01:00:00Z",
        "end_time": "2026-11-25T01:02:30Z" if over else NEVER,
    }
    if message:
        node["error"] = {"code": 13, "message": message}
    return node


def omitted(name: str) -> list[dict[str, tp.Any]]:
    """What Argo passes over after a failure: a step and its driver, without states and duration.

    Seen on a KFP 2.17.0.
    """
    nodes = [task(f"{name}-driver", "SUCCEEDED"), task(name, "SUCCEEDED")]
    for node in nodes:
        del node["state"]
        node["end_time"] = node["start_time"]
    return nodes


def retried(name: str, *attempts: str) -> list[dict[str, tp.Any]]:
    """A step that may run again: one node for it, and one for each attempt."""
    nodes = [task(f"{name}-driver", "SUCCEEDED"), task(f"{name}-driver(0)", "SUCCEEDED")]
    nodes += [task(name, attempts[-1])]
    for i, state in enumerate(attempts):
        nodes += [task(f"{name}({i})", state), task("executor", state), task("executor(0)", state)]
    return nodes


def step(name: str, *states: str) -> list[dict[str, tp.Any]]:
    """All nodes of a step with one part per state: driver, step and executor of each."""
    nodes = []
    for state in states:
        nodes += [task(f"{name}-driver", "SUCCEEDED"), task(name, state), task("executor", state)]
    return nodes


def look(state: str, *nodes: list[dict[str, tp.Any]], **fields: tp.Any) -> dict[str, tp.Any]:
    """What one look at a run adds to it."""
    root = [task("saev-x7k2p", state), task("root-driver", "SUCCEEDED"), task("root", state)]
    details = {"task_details": root + [node for group in nodes for node in group]}
    over = state in ("SUCCEEDED", "FAILED", "CANCELED")
    ended = (
        {"finished_at": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%dT%H:%M:%SZ}"} if over else {}
    )
    return {"state": state, "run_details": details, **ended, **fields}


@contextlib.contextmanager
def running(
    multi_user: bool = False, tls: ssl.SSLContext | None = None
) -> collections.abc.Iterator[KfpServer]:
    """The server on a free port of this machine."""
    state = KfpServer(multi_user)
    handler = type("Handler", (_Handler,), {"state": state})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    if tls:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    scheme = "https" if tls else "http"
    state.url = f"{scheme}://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
