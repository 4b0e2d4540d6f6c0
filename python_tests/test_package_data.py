"""What a wheel and a source distribution hold beside the code: the model that comes with the package."""

import shutil
import subprocess
import sys
import tarfile

import pytest

from klflow_ext.run import STORIES

ROOT = STORIES.parents[1]
FILES = ("config.json", "model.safetensors", "tokenizer.json", "README.md")


@pytest.mark.slow
def test_the_model_goes_with_the_package(tmp_path):
    if not (ROOT / "setup.py").is_file():
        pytest.skip("the package is installed: there is no source to build from")
    for name in ("pyproject.toml", "setup.py", "klflow.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "klflow_ext" / "stories").mkdir(parents=True)
    shutil.copy(ROOT / "klflow_ext" / "__init__.py", tmp_path / "klflow_ext")
    for name in FILES:
        (tmp_path / "klflow_ext" / "stories" / name).write_text(name)
    for command in (["build_py", "--build-lib", "built"], ["sdist", "--formats", "gztar", "--dist-dir", "source"]):
        done = subprocess.run(
            [sys.executable, "setup.py", "-q", *command], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    assert {file.name for file in (tmp_path / "built" / "klflow_ext" / "stories").iterdir()} == set(FILES)
    assert (tmp_path / "built" / "klflow.py").is_file()
    with tarfile.open(next((tmp_path / "source").iterdir())) as archive:
        held = [name.partition("/klflow_ext/stories/")[2] for name in archive.getnames()]
    assert set(held) >= set(FILES)
