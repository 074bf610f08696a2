"""A Hub that is gone while a run trains: a server on this machine that takes a repository's name, and no files."""

import json
import struct
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socket import SO_LINGER, SOL_SOCKET

import pytest
from support.processes import TRAIN_ENVIRONMENT
from support.small import REPOSITORY

pytestmark = pytest.mark.slow


class Hub(BaseHTTPRequestHandler):
    def do_POST(self):
        if self.path != "/api/repos/create":
            self.connection.setsockopt(SOL_SOCKET, SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()  # a reset
            return
        self.rfile.read(int(self.headers["Content-Length"]))
        self.answer({"url": "http://127.0.0.1/me/pets", "name": "me/pets"})

    def do_GET(self):
        self.answer({"name": "me", "type": "user", "auth": {"accessToken": {"role": "write"}}})

    def answer(self, value):
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


def test_training_goes_on_and_the_model_is_saved_where_the_hub_is_gone(tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {
        **TRAIN_ENVIRONMENT, "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0",
        "HF_TOKEN": "hf_abc", "HF_HOME": str(tmp_path / "home"),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "scripts/run_orpo.py", "recipes/quickstart.yaml", "--max_steps", "4", "--eval_strategy", "no",
         "--save_strategy", "steps", "--save_steps", "2", "--push_to_hub", "--hub_model_id", "me/pets",
         "--output_dir", str(tmp_path / "out")],
        cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    server.shutdown()
    printed = done.stdout + done.stderr
    assert done.returncode == 1, printed
    assert "A push to the Hub has failed, and training goes on" in printed
    assert "could not be sent to the Hub" in printed
    assert f"`hf upload me/pets {tmp_path / 'out'}` sends it." in printed
    assert "Traceback" not in printed
    assert "saved" in json.loads((tmp_path / "out" / "run.json").read_text())
