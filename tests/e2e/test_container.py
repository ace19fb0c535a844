"""The installation steps of the Dockerfile, and the agreement of Dockerfile and compose files."""

import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml
from support import ROOT, SAMPLES


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_an_installation_with_the_steps_of_the_image_can_train_and_serve(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    environment = {**os.environ, "PATH": f"{folder}/sage/bin:{os.environ['PATH']}", "SAGE_RESTART_POLICY": "unless-stopped"}
    environment.pop("PYTHONPATH", None)

    def run(*command: str) -> str:
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
        return done.stdout

    environment["PIP_NO_COMPILE"] = "1"  # saves half a minute; each module is compiled when it is imported
    run(str(ROOT / "docker" / "install.sh"), str(folder / "sage"))
    assert (folder / "sage/bin/sage").is_file()
    run("sage", "doctor")
    run("sage", "llm", "engine", "start", str(tiny_model), "--engine-kind", "finetune", "--dataset", str(SAMPLES),
        "--output", str(folder / "out"), "--max-steps", "1", "--wait")  # fmt: skip
    run("sage", "llm", "engine", "start", str(folder / "out"), "--name", "tuned")
    run("sage", "llm", "chat", "tuned", "--message", "Hello", "--max-tokens", "4")
    run("sage", "gateway", "status")
    run("sage", "gateway", "stop")


def test_the_image_runs_the_gateway_without_root_and_keeps_its_data_in_the_volume() -> None:
    text = (ROOT / "Dockerfile").read_text()
    final = text.rpartition("\nFROM ")[2]
    assert re.search(r"^USER sage$", final, re.MULTILINE)
    assert re.search(r"^VOLUME /data$", final, re.MULTILINE)
    assert "SAGE_HOME=/data" in final
    assert 'CMD ["python", "-m", "sage.llm.gateway"]' in final
    assert "docker/install.sh /opt/sage" in text


def test_the_compose_files_mount_the_volume_and_name_the_build_argument_of_the_image() -> None:
    service = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]["sage"]
    assert service["volumes"] == ["data:/data"]
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    cuda = yaml.safe_load((ROOT / "compose.cuda.yaml").read_text())["services"]["sage"]
    [argument] = cuda["build"]["args"]
    assert f"ARG {argument}=" in (ROOT / "Dockerfile").read_text()
