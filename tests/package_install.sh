#!/usr/bin/env bash
# Checks the package as others get it (by hand; a minute): builds the sdist, the wheel from the sdist, installs the wheel
# in an empty environment that borrows the dependencies of the given one, and uses it from another folder.
#     tests/package_install.sh [python, default .venv/bin/python; needs the package `build`]
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(realpath --no-symlinks "${1:-.venv/bin/python}")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

git clone --quiet . "$work/clone"
(cd "$work/clone" && "$python" -m build --outdir "$work/dist" . > "$work/build.log" 2>&1) || { tail -40 "$work/build.log"; exit 1; }
ls -l "$work/dist"
tar tzf "$work"/dist/*.tar.gz | cut -d/ -f2- | grep -v '/$' | sort > "$work/in_sdist"
git -C "$work/clone" ls-files csrc fastalign kernels tests benchmarks LICENSE README.md CONTRIBUTING.md constraints.txt Makefile setup.py pyproject.toml | sort > "$work/wanted"
missing=$(comm -13 "$work/in_sdist" "$work/wanted" | grep -v '^benchmarks/results' || true)
[ -z "$missing" ] || { echo "missing from the sdist: $missing"; exit 1; }

"$python" -m venv "$work/env"
"$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > "$work/site"
cp "$work/site" "$("$work/env/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/borrowed.pth"
"$work/env/bin/python" -m pip install --quiet --no-deps --force-reinstall --ignore-installed "$work"/dist/*.whl
cd "$work"
"$work/env/bin/python" - <<'PYTHON'
import pathlib
import fastalign_kernels.head
import fastalign
from fastalign import _native
from fastalign.data.packing import plan_packs

for module in (fastalign, fastalign_kernels, _native):
    assert pathlib.Path(module.__file__).is_relative_to(pathlib.Path("env").resolve()), module.__file__
folder = pathlib.Path(fastalign.__file__).parent
assert list(folder.glob("data/templates/*.jinja")) and (folder / "py.typed").exists() and (folder / "_native.pyi").exists()
assert len(plan_packs([3, 5, 2], 8)) == 2
for name in fastalign.__all__:
    getattr(fastalign, name)
print("installed from the wheel:", fastalign.__version__, len(fastalign.__all__), "public names")
PYTHON
"$work/env/bin/fastalign" env > /dev/null
echo "ok"
