"""A hub of models on the loopback, as far as huggingface_hub asks one: files by repository, revision and name."""

from __future__ import annotations

import hashlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

COMMIT = "1" * 40


class HubServer:
    """Serves FOLDER/OWNER/NAME/FILE as OWNER/NAME until `close`; `requests` are those so far, such as "GET /a/b/…"."""

    def __init__(self, folder: Path):
        hub = self
        self.folder, self.requests = folder, list[str]()

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.answer(send=False)

            def do_GET(self) -> None:
                self.answer(send=True)

            def answer(self, send: bool) -> None:
                hub.requests.append(f"{self.command} {self.path}")
                owner, name, *rest = self.path.partition("?")[0].strip("/").split("/")
                path = hub.folder.joinpath(owner, name, *rest[2:])
                repository = hub.folder / owner / name
                if rest[:1] != ["resolve"] or not path.is_file():
                    self.send_response(404)
                    self.send_header("X-Error-Code", "EntryNotFound" if repository.is_dir() else "RepoNotFound")
                    content = b""
                else:
                    content = path.read_bytes()
                    self.send_response(200)
                    self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
                self.send_header("X-Repo-Commit", COMMIT)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if send:
                    self.wfile.write(content)

            def log_message(self, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    @property
    def endpoint(self) -> str:
        """The value of HF_ENDPOINT."""
        return f"http://127.0.0.1:{self.server.server_port}"

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()
