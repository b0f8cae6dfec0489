"""A small server of one base model that loads PEFT adapters at run time, as vLLM and SGLang do; it really computes."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

from mpo_megatron.config import TransformersConfig
from mpo_megatron.data.tokenizer import load_tokenizer
from mpo_megatron.rollout.engines import Prompt, Sampling
from mpo_megatron.rollout.engines.embedded import EmbeddedEngine
from tests.local_server import LocalServer

BASE = "base"
"""Name of the base model on this server."""


class AdapterServer:
    """Implements the part of the protocol that `mpo generate` uses with `api: tokens`."""

    def __init__(self, folder: Path, kind: str) -> None:
        """Serve the Hugging Face checkpoint in `folder`; `kind` is vllm or sglang."""
        self.folder, self.kind, self.tokenizer = folder, kind, load_tokenizer(folder)
        self.engines = {BASE: self._engine(None)}
        self.asked: list[tuple[str, dict[str, Any]]] = []
        """(path, body) of every request."""
        self.loads_adapters = True
        self.lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                names = [{"id": name, "owned_by": outer.kind} for name in outer.engines]
                self.send(200 if self.path == "/v1/models" else 404, {"data": names})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with outer.lock:
                    outer.asked.append((self.path, body))
                    self.send(*outer.answer(self.path, body))

            def send(self, status: int, content: Any) -> None:
                text = content if isinstance(content, str) else json.dumps(content)
                self.send_response(status)
                self.send_header("content-type", "text/plain" if isinstance(content, str) else "application/json")
                self.send_header("content-length", str(len(text.encode())))
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_: Any) -> None:
                pass

        self.server = LocalServer(Handler)
        self.url = f"{self.server.url}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def _engine(self, adapter: Path | None) -> EmbeddedEngine:
        return EmbeddedEngine.load(self.folder, self.tokenizer, TransformersConfig(device="cpu"), adapter)

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    @property
    def actions(self) -> list[str]:
        """Last path components of all requests other than completions, in order."""
        return [path.rpartition("/")[2] for path, _ in self.asked if not path.endswith("completions")]

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        """(status, body) of the answer to a POST."""
        prefix = "/v1" if self.kind == "vllm" else ""
        if path == "/v1/completions":
            return self._complete(body)
        if not self.loads_adapters or path not in (f"{prefix}/load_lora_adapter", f"{prefix}/unload_lora_adapter"):
            return 404, {"detail": "Not Found"}
        name = body["lora_name"]
        if path.endswith("unload_lora_adapter"):
            found = self.engines.pop(name, None) is not None
            return self._say(200 if found else 404, f"{name} removed" if found else f"The lora adapter '{name}' cannot be found.")
        if name in self.engines:
            return self._say(400, f"The lora adapter '{name}' has already been loaded.")
        if not Path(body["lora_path"]).is_dir():
            return self._say(404, f"No adapter found for {body['lora_path']}")
        self.engines[name] = self._engine(Path(body["lora_path"]))
        return self._say(200, f"Success: LoRA adapter '{name}' added successfully.")

    def _say(self, status: int, message: str) -> tuple[int, Any]:
        """In each server's format: vLLM answers with text or an error object; SGLang with JSON."""
        if self.kind == "sglang":
            return (200, {"success": True}) if status == 200 else (400, {"success": False, "error_message": message})
        return status, message if status == 200 else {"error": {"message": message, "code": status}}

    def _complete(self, body: dict[str, Any]) -> tuple[int, Any]:
        model = body["model"] if self.kind == "vllm" else body.get("lora_path", body["model"])
        if model not in self.engines:
            return 404, {"error": {"message": f"The model `{model}` does not exist."}}
        sampling = Sampling(
            num_responses=1,
            max_tokens=body["max_tokens"],
            temperature=body["temperature"],
            stop_token_ids=tuple(body["stop_token_ids"]),
        )
        prompt = Prompt(group_id="g", token_ids=tuple(body["prompt"]), messages=(), seeds=(body["seed"],))
        ((response,),) = (generation.responses for generation in self.engines[model].generate([prompt], sampling))
        choice = {"text": response.text, "finish_reason": response.finish_reason, "token_ids": list(response.token_ids)}
        return 200, {"choices": [choice], "usage": {"completion_tokens": response.num_tokens}}
