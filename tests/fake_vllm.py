"""A server that speaks vLLM's protocol and samples from a table: what a test says it does, it does."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from safetensors.torch import load_file


class FakeVLLM:
    """Answers on a port of this machine. `calls` lists what came, as (path, query, body)."""

    def __init__(self, settings=None, port=0):
        self.settings = {"model_config": {"dtype": "torch.float32"}} | (settings or {})
        self.calls, self.weights, self.version, self.paused = [], {}, "", False
        self.faults: dict[str, list[int]] = {}  # path -> status codes of the next answers; 0: hang up
        self.hold = threading.Event()  # completions wait for it
        self.hold.set()
        self.gone = False
        self._server = ThreadingHTTPServer(("127.0.0.1", port), self._handler())
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self):
        """Ends without another answer."""
        self.gone = True
        self.hold.set()
        self._server.shutdown()
        self._server.server_close()

    def paths(self):
        return [path for path, _, _ in self.calls]

    def answer(self, path, query, body):
        """(status, what is sent as JSON)."""
        if path == "/v1/models":
            return 200, {"data": [{"id": "model", "max_model_len": 64}]}
        if path == "/server_info":
            return 200, {"vllm_config": self.settings}
        if path == "/collective_rpc":
            folder = Path(body["kwargs"]["weights_path"])
            self.weights = {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}
        elif path == "/v1/load_lora_adapter":
            folder = Path(body["lora_path"])
            self.weights = load_file(folder / "adapter_model.safetensors")
            self.adapter = json.loads((folder / "adapter_config.json").read_text())
        elif path == "/pause":
            self.paused = True
        elif path == "/resume":
            self.paused = False
        elif path == "/update_weight_version":
            self.version = body["new_version"]
        elif path == "/weight_info":
            return 200, {"weight_version": self.version}
        elif path == "/reset_prefix_cache":
            return 200, {"success": True}
        elif path == "/v1/completions":
            self.hold.wait(30)
            length = min(body["max_tokens"], 1 + body["seed"] % 3)
            ids = [body["prompt"][-1] + body["seed"] + i for i in range(length)]
            logprobs = {"token_logprobs": [-0.5 * i for i in range(length)]}
            return 200, {"choices": [{"token_ids": ids, "logprobs": logprobs, "finish_reason": "length"}]}
        return 200, None

    def _handler(fake):
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_one(self):
                url = urlsplit(self.path)
                data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                body = json.loads(data) if data else None
                fake.calls.append((url.path, parse_qs(url.query), body))
                faults = fake.faults.get(url.path)
                fault = faults.pop(0) if faults else None
                if fault == 0:
                    self.close_connection = True
                    self.connection.close()
                    return
                status, answer = (
                    (fault, {"error": "as the test wants"})
                    if fault
                    else fake.answer(url.path, parse_qs(url.query), body)
                )
                if fake.gone:
                    self.close_connection = True
                    return
                text = b"" if answer is None else json.dumps(answer).encode()
                try:
                    self.send_response(status)
                    self.send_header("Content-Length", str(len(text)))
                    self.end_headers()
                    self.wfile.write(text)
                except OSError:  # nobody waits for it any more
                    self.close_connection = True

            do_GET = do_POST = handle_one

            def log_message(self, *args):
                pass

        return Handler
