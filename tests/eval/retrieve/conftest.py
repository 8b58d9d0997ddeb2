from pathlib import Path

import pytest

from fastdino.model import export_backbone
from tests.eval.retrieve.networks import CONFIG, vit


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "a.safetensors"
    export_backbone(vit(), path, {"config": CONFIG.to_json()})
    return path
