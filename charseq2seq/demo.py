"""`--mode demo`: a page on which the model writes, for the browsers of this machine alone."""

from __future__ import annotations

import functools
import os
import shutil
import sys
import tempfile
import webbrowser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from charseq2seq.checkpoint import load_checkpoint
from charseq2seq.console import is_terminal, log, write_result
from charseq2seq.errors import require_packages
from charseq2seq.files import write_error

PAGE = Path(__file__).parent / "publishing" / "published" / "demo"


class _Handler(SimpleHTTPRequestHandler):
    extensions_map = SimpleHTTPRequestHandler.extensions_map | {".js": "text/javascript"}  # Windows may say text/plain

    def log_message(self, *_: Any) -> None:
        """Log no request."""


class _Server(ThreadingHTTPServer):
    def handle_error(self, *_: Any) -> None:
        """Log nothing if a browser left before it had the whole file."""


def page_server(folder: Path) -> ThreadingHTTPServer:
    """A server of the folder's files on a free port, reachable only from this machine."""
    return _Server(("127.0.0.1", 0), functools.partial(_Handler, directory=folder))


def serve_demo(model_path: Path) -> None:
    """Print the address of the page with this model, and serve it until the program is interrupted."""
    require_packages("the page", "safetensors")
    checkpoint = load_checkpoint(model_path)
    model = checkpoint.build_model()
    with tempfile.TemporaryDirectory(prefix="charseq2seq-demo-") as folder:
        try:
            shutil.copytree(PAGE, folder, dirs_exist_ok=True)
            model.save_pretrained(folder)
        except OSError as error:
            raise write_error(Path(folder), error) from error
        with page_server(Path(folder)) as server:
            address = f"http://127.0.0.1:{server.server_port}/"
            write_result(address + "\n")
            log("Ctrl-C ends it.")
            has_screen = sys.platform in ("win32", "darwin") or {"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys()
            if is_terminal() and has_screen:
                webbrowser.open(address)
            server.serve_forever()
