"""`--adapter NAME=DIR`: chosen by the request's model name, several at once, beside the model alone."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from safetensors.numpy import save_file

CHAT = "/v1/chat/completions"


def adapter(folder: Path, seed: int) -> Path:
    """A random adapter of the tiny model, in PEFT's format."""
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps({**config, "task_type": "CAUSAL_LM"}))
    rng, sizes = np.random.default_rng(seed), {"self_attn.q_proj": (32, 32), "mlp.down_proj": (48, 32)}
    weights = {}
    for layer in range(2):
        for name, (inputs, outputs) in sizes.items():
            path = f"base_model.model.model.layers.{layer}.{name}"
            weights[f"{path}.lora_A.weight"] = rng.standard_normal((4, inputs)).astype(np.float32)
            weights[f"{path}.lora_B.weight"] = rng.standard_normal((outputs, 4)).astype(np.float32)
    save_file(weights, folder / "adapter_model.safetensors")
    return folder


@pytest.fixture(scope="module")
def server(start: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("adapters")
    named = [f"--adapter={name}={adapter(folder / name, seed)}" for seed, name in enumerate(("poet", "clerk"))]
    with start(*named) as server:
        yield server


def test_an_adapter_is_chosen_by_name_and_several_run_at_once(server: Any) -> None:
    async def say(client: httpx.AsyncClient, name: str) -> str:
        said = [{"role": "user", "content": "Write to me."}]
        body = {"model": name, "messages": said, "temperature": 0, "max_tokens": 40}
        answer = await client.post(CHAT, json=body)
        assert answer.status_code == 200 and answer.json()["model"] == name
        return answer.json()["choices"][0]["message"]["content"]

    async def all_of_them() -> tuple[list[str], list[str]]:
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
            names = ["tiny", "poet", "clerk", "tiny:poet", "tiny:clerk"]
            alone = [await say(client, name) for name in names]
            return alone, await asyncio.gather(*(say(client, name) for name in names * 3))

    alone, together = asyncio.run(all_of_them())
    assert together == alone * 3
    assert alone[1] == alone[3] and alone[2] == alone[4] and len(set(alone)) == 3


def test_adapters_are_models_with_a_parent(server: Any) -> None:
    rows = httpx.get(f"{server.url}/v1/models").json()["data"]
    assert [(row["id"], row["parent"]) for row in rows] == [("tiny", None), ("poet", "tiny"), ("clerk", "tiny")]
    assert httpx.get(f"{server.url}/v1/models/tiny:poet").json()["id"] == "poet"


@pytest.mark.parametrize("name", ["../poet", "poet/", "tiny:poet:clerk", "clerk:poet", "poet:tiny"])
def test_a_path_is_no_name(server: Any, name: str) -> None:
    body = {"model": name, "messages": [{"role": "user", "content": "Hi"}]}
    answer = httpx.post(server.url + CHAT, json=body)
    assert answer.status_code == 404 and answer.json()["error"]["code"] == "model_not_found"
