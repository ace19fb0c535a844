"""Each mistake of a user is reported in one sentence with a hint and the right exit code, and nothing is started."""

import json
import os
import socket
from pathlib import Path

import httpx
import pytest
from support import SAMPLES, chat_record, engine_of, list_engines, sage, wait_for, write_jsonl


def finetune(model: str | Path, dataset: Path, output: Path, *options: str) -> tuple[str, ...]:
    return ("llm", "engine", "start", str(model), "--engine-kind", "finetune", "--dataset", str(dataset),
            "--output", str(output), *options)  # fmt: skip


def test_a_mistake_is_reported_and_nothing_is_started(tiny_model: Path, tmp_path: Path, sage_home: Path) -> None:
    out, foreign = tmp_path / "out", tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").touch()
    cases: list[tuple[tuple[str, ...], int, str, str]] = [
        (finetune(tiny_model, tmp_path / "none.jsonl", out), 1, "none.jsonl does not exist", "Use a .jsonl"),
        (finetune("org/unknown", SAMPLES, out), 1, "No model 'org/unknown': it is not in", "model list"),
        (finetune("./unknown", SAMPLES, out), 1, "No model", "model list"),
        (finetune(tiny_model, SAMPLES, foreign), 1, "is not empty: it contains thesis.tex", "--output"),
        (
            finetune(tiny_model, SAMPLES, out, "--lora-rank", "0"),
            2,
            "lora_rank: input should be greater than",
            "nothing was",
        ),
        (finetune(tiny_model, SAMPLES, out, "--learning-rate", "-1"), 2, "learning_rate: input should be", "got -1"),
        (finetune(tiny_model, SAMPLES, out, "--precision", "fp8"), 2, "precision: input should be 'auto'", "fp32"),
        (("llm", "engine", "start", str(tiny_model), "--engine-kind", "finetune"), 2, "needs --dataset", ""),
        (("llm", "engine", "start", str(tiny_model), "--dataset", str(SAMPLES)), 2, "--dataset is an option", "To train"),
        (("llm", "engine", "start", "org/unknown"), 1, "No model 'org/unknown'", "model import"),
        (("llm", "engine", "start", str(tiny_model), "--engine-kind", "nonsense"), 2, "nonsense", "finetune"),
        (("llm", "engine", "start", str(tiny_model), "--name", "sage-default"), 2, "name", "sage-default"),
        (("llm", "engine", "stop", "engine-none"), 1, "No engine 'engine-none'", "engine list"),
        (("llm", "engine", "stop", "../../models"), 1, "No engine '../../models'", "engine list"),
        (("llm", "engine", "stop", ""), 1, "No engine ''", "engine list"),
        ((*finetune(tiny_model, SAMPLES, out)[:-3], "", "--output", str(out)), 2, "dataset_path is empty", "Give a path"),
        ((*finetune(tiny_model, SAMPLES, out)[:-1], ""), 2, "output_dir is empty", "Give a path"),
        (("llm", "engine", "start", ""), 2, "The model's name is empty", "Give the name"),
        (("llm", "engine", "status", "engine-none"), 1, "No engine 'engine-none'", "engine list"),
        (("llm", "engine", "logs", "engine-none", "--follow"), 1, "No engine 'engine-none'", "engine list"),
        (("llm", "engine", "resume", "engine-none"), 1, "No engine 'engine-none'", "engine list"),
        (("llm", "engine", "remove", "engine-none"), 1, "No engine 'engine-none'", "engine list"),
        (("llm", "chat", "nobody", "--message", "hi"), 1, "serves the model 'nobody'", "engine start nobody"),
        (("llm", "chat", "--message", "hi"), 1, "serves the model 'sage-default'", "engine start MODEL"),
        (("llm", "model", "import", str(tmp_path / "none")), 1, "is not a folder", "Give the folder of a model"),
        (("llm", "dataset", "check", str(tmp_path / "none.jsonl")), 1, "does not exist", "Use a .jsonl"),
        (("llm", "nonsense"), 2, "No such command 'nonsense'", ""),
    ]
    for arguments, exit_code, message, hint in cases:
        done = sage(*arguments, check=exit_code)
        stderr = " ".join(done.stderr.split())
        assert message in stderr, (arguments, stderr)
        assert hint in stderr, (arguments, stderr)
        assert "Traceback" not in stderr, arguments
        assert done.stdout == "", arguments
    assert list_engines() == {}
    assert not out.exists()
    assert list((sage_home / "data/models/finetuned").glob("*")) == []


def test_an_engine_with_an_unusable_dataset_or_output_fails_before_a_process_is_started(
    tiny_model: Path, tmp_path: Path, sage_home: Path
) -> None:
    good = [chat_record(f"q{i}", "a") for i in range(20)]
    broken = tmp_path / "broken.jsonl"
    broken.write_text("\n".join([*map(json.dumps, good[:16]), "{nonsense", *map(json.dumps, good[17:])]))
    wizard = write_jsonl(tmp_path / "wizard.jsonl", [{"messages": [{"role": "wizard", "content": "x"}]}])
    silent = write_jsonl(tmp_path / "silent.jsonl", [{"messages": [{"role": "user", "content": "x"}]}])
    empty = write_jsonl(tmp_path / "empty.jsonl", [])
    out = tmp_path / "out"
    cases: list[tuple[tuple[str, ...], str, str]] = [
        (finetune(tiny_model, empty, out), "empty.jsonl is empty", "Each line is one JSON object"),
        (finetune(tiny_model, broken, out), "broken.jsonl:17: not valid JSON", "lists every fault"),
        (finetune(tiny_model, wizard, out), 'wizard.jsonl:1: messages[0].role is "wizard"', "one of system, user"),
        (finetune(tiny_model, silent, out), "silent.jsonl:1: no assistant turn", "Add the answer"),
        (finetune(tiny_model, SAMPLES, out, "--eval", str(empty)), "empty.jsonl is empty", "Each line"),
        (finetune(tiny_model, SAMPLES, Path("/proc/out")), "/proc/out cannot be written", "--output"),
    ]
    for arguments, message, hint in cases:
        done = sage(*arguments, check=1)
        stderr = " ".join(done.stderr.split())
        assert message in stderr, arguments
        assert hint in stderr, arguments
        assert "Traceback" not in stderr, arguments
        engine = list_engines()[engine_of(done)]
        assert (engine["state"], engine["pid"]) == ("failed", None)
        assert message in engine["reason"]["message"]
    assert not out.exists()
    assert list((sage_home / "data/models/finetuned").glob("*")) == []


def test_the_same_mistakes_over_http_get_an_error_status_and_openai_s_error_format(tiny_model: Path, tmp_path: Path) -> None:
    sage("gateway", "start")
    http = httpx.Client(base_url=f"http://127.0.0.1:{os.environ['SAGE_GATEWAY_PORT']}")
    options = {"dataset_path": str(SAMPLES), "output_dir": str(tmp_path / "out")}
    start = "/v1/management/engines/start"
    finetune_request = {"model": str(tiny_model), "engine_kind": "finetune", "options": options}
    cases = [
        ("POST", start, {**finetune_request, "options": {**options, "lora_rank": 0}}, 400, "config_invalid", "lora_rank"),
        ("POST", start, {**finetune_request, "options": {**options, "dataset_path": "/none.jsonl"}}, 400,
         "dataset_unusable", "dataset_path"),
        ("POST", start, {**finetune_request, "model": "org/unknown"}, 404, "model_not_found", "model"),
        ("POST", start, {**finetune_request, "port": 9}, 409, "no_port", None),
        ("POST", start, {"model": str(tiny_model), "engine_kind": "nonsense"}, 400, "config_invalid", "engine_kind"),
        ("POST", start, {"modle": "x"}, 400, "config_invalid", "model"),
        ("POST", "/v1/management/engines", {"model": ""}, 400, "config_invalid", "model"),
        ("GET", "/v1/management/engines/engine-none", None, 404, "engine_not_found", "engine_id"),
        ("DELETE", "/v1/management/engines/engine-none", None, 404, "engine_not_found", "engine_id"),
        ("GET", "/v1/management/engines/engine-none/logs?tail=-1", None, 400, "config_invalid", "tail"),
        ("GET", "/v1/models/nobody", None, 404, "model_not_found", "model"),
        ("GET", "/v1/nothing", None, 404, "not_found", None),
        ("PUT", "/v1/models", None, 405, "method_not_allowed", None),
    ]  # fmt: skip
    for method, path, body, status, code, param in cases:
        answer = http.request(method, path, json=body)
        assert answer.status_code == status, (path, answer.text)
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code", "hint"}
        assert (error["code"], error["param"]) == (code, param), path
        assert error["message"]
    assert http.get("/v1/management/engines").json() == {
        "object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False,
    }  # fmt: skip
    assert http.get("/ready").json()["status"] == "ready"
    assert http.get("/v1/management/gpu").json()["data"][-1]["name"] == "main memory"


def test_if_all_samples_are_longer_than_the_cutoff_the_start_command_fails(tiny_model: Path, tmp_path: Path) -> None:
    long = write_jsonl(tmp_path / "long.jsonl", [chat_record("many words " * 50, "a")])
    done = sage(*finetune(tiny_model, long, tmp_path / "out", "--max-seq-length", "32"), check=1)
    assert "In all 1 sequences, the answer begins after the cutoff of 32 tokens" in done.stderr
    assert "Raise max_seq_length" in done.stderr
    engine = engine_of(done)
    assert list_engines()[engine]["state"] == "failed"
    # The failed run wrote no result, so its claim on the output folder does not block another run.
    done = sage(*finetune(tiny_model, long, tmp_path / "out", "--max-steps", "1", "--wait"))
    assert "is completed" in done.stderr


def test_a_used_port_of_the_dashboard_is_named_in_the_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = sage("studio", "--port", str(taken.getsockname()[1]), check=1)
    assert "The dashboard cannot listen on 127.0.0.1:" in done.stderr
    assert "Choose another port" in done.stderr


def test_for_a_used_port_of_the_gateway_the_error_names_the_setting() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", int(os.environ["SAGE_GATEWAY_PORT"])))
        other.listen()
        done = sage("llm", "engine", "list", check=3)
    assert "cannot listen on 127.0.0.1" in done.stderr
    assert "Address already in use" in done.stderr
    assert "SAGE_GATEWAY_PORT" in done.stderr


def test_a_gateway_on_another_machine_that_does_not_answer_is_not_started_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAGE_GATEWAY_HOST", "gateway.invalid")
    done = sage("llm", "engine", "list", check=3)
    assert "does not answer" in done.stderr
    assert "Starting the gateway" not in done.stderr


def test_two_runs_do_not_share_an_output_folder(tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = engine_of(sage(*finetune(tiny_model, SAMPLES, out, "--num-epochs", "50", "--batch-size", "1")))
    done = sage(*finetune(tiny_model, SAMPLES, out), check=1)
    assert "is being written by task-" in done.stderr
    sage("llm", "engine", "stop", first)
    done = sage(*finetune(tiny_model, SAMPLES, out), check=1)
    assert "contains the result of the run task-" in done.stderr
    done = sage("llm", "engine", "stop", first)
    assert "was already stopped" in done.stdout


def test_a_dataset_check_reports_all_faults_and_figures(tiny_model: Path, tmp_path: Path) -> None:
    done = sage("llm", "dataset", "check", str(SAMPLES), "--model", str(tiny_model), "--max-seq-length", "64")
    assert "92 samples (92 openai), 97 assistant turns, 0 faults, 0 duplicates" in done.stdout
    assert "cutoff 64: " in done.stdout
    report = json.loads(sage("llm", "dataset", "check", str(SAMPLES), "--model", str(tiny_model), "--json").stdout)
    assert report["tokens"]["trained"] > 0
    assert len(report["tokens"]["lengths"]) == 92
    bad = write_jsonl(tmp_path / "bad.jsonl", [chat_record("q", "a"), chat_record("q", "a"), {"x": 1}, []])
    done = sage("llm", "dataset", "check", str(bad), "--model", str(tiny_model), check=1)
    assert "bad.jsonl:3: no known format" in done.stdout
    assert "bad.jsonl:4: a JSON object is expected" in done.stdout
    assert "has the same content as line 1" in done.stdout
    done = sage("llm", "dataset", "check", str(bad), "--model", "org/unknown", check=1)
    assert "tokens were not counted with org/unknown: No model" in done.stdout
    long = write_jsonl(tmp_path / "long.jsonl", [chat_record("many words " * 50, "a")])
    done = sage("llm", "dataset", "check", str(long), "--model", str(tiny_model), "--max-seq-length", "16", check=1)
    assert "the answer begins after the cutoff" in done.stderr


def test_ctrl_c_ends_the_waiting_command_and_the_run_continues(tiny_model: Path, tmp_path: Path) -> None:
    import signal
    import subprocess

    from support import SAGE

    command = [*SAGE, *finetune(tiny_model, SAMPLES, tmp_path / "out", "--num-epochs", "60", "--batch-size", "1", "--wait")]
    waiting = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert waiting.stdout is not None
    engine = waiting.stdout.readline().strip()
    wait_for(lambda: list_engines()[engine]["training"]["step"] >= 2, "a step")
    waiting.send_signal(signal.SIGINT)
    _, output = waiting.communicate(timeout=30)
    assert waiting.returncode == 130
    assert f"{engine} is still running" in output
    assert list_engines()[engine]["state"] == "running"
    done = sage("llm", "engine", "stop", engine, "--force")
    assert "has failed" in done.stdout
