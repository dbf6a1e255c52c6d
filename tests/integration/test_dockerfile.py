"""The commands of the image's CPU stages, one after the other in a fresh folder: no container engine is needed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from dockerfile import read_dockerfile, run_stage, run_step

ROOT = Path(__file__).resolve().parents[2]
STAGES = {stage.name: stage for stage in read_dockerfile((ROOT / "Dockerfile").read_text(encoding="utf-8"))[1]}
CHANGES_THE_MACHINE = ["useradd "]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that stands for the root of the CPU image; its environment holds what pip installed."""
    roots = tmp_path_factory.mktemp("image")
    try:
        run_stage(STAGES["wheel"], ROOT, roots, CHANGES_THE_MACHINE)
        return run_stage(STAGES["cpu"], ROOT, roots, CHANGES_THE_MACHINE)
    except AssertionError as error:
        if "Connection" in str(error):
            pytest.skip("no package index can be reached")
        raise


@pytest.mark.timeout(3600)
def test_the_cpu_image_holds_the_program_and_the_job_scripts(image: Path, tmp_path: Path) -> None:
    [version] = re.findall(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert run_step("can-dist --version", image, tmp_path).strip().endswith(f" {version}")
    place = "import can_dist; print(can_dist.__file__)"
    assert Path(run_step(f"python -c '{place}'", image, tmp_path).strip()).is_relative_to(image / "venv")
    assert "Usage" in run_step(f"python {image}/can-dist/ray_jobs/run.py --help", image, tmp_path)
    assert run_step("python -m pip check", image, tmp_path) == "No broken requirements found.\n"
    small = "--set prompts.num_train=40 --set prompts.num_test=16 --set prompts.num_validation=0 --set strength=1"
    small += " --set generate.num_responses=4 --set evaluate.num_responses=2 --set train.num_epochs=1"
    assert "report: " in run_step(f"can-dist demo {small} --set constraints.safety.margin=0.1", image, tmp_path)


@pytest.mark.timeout(1200)
def test_without_a_wheel_of_flash_attn_the_cuda_image_goes_on_without(image: Path) -> None:
    """The step of the CUDA stage, in the environment of the CPU stage: for its torch nobody builds a wheel."""
    [step] = [rest for _, rest in STAGES["cuda"].steps if "flash-attn" in rest]
    run_step(step, image, image / "can-dist")
    assert "flash-attn" not in run_step("python -m pip list", image, image)
