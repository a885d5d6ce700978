#!/usr/bin/env bash
# completion.sh HEED COMPLETION: what bash completion offers is what the command knows.
set -euo pipefail
heed=$1
source "$2"

# offers LINE WORD...: completing LINE offers exactly these words, in any order.
offers() {
  local want
  want=$(printf '%s\n' "${@:2}" | sort)
  COMP_LINE=$1 COMP_POINT=${#1}
  _heed "$heed" || true
  if [[ $(printf '%s\n' "${COMPREPLY[@]}" | sort) != "$want" ]]; then
    echo "completing '$1' offers: ${COMPREPLY[*]}; expected: ${*:2}"
    exit 1
  fi
}

mapfile -t commands < <("$heed" --help | sed -n '/^Commands:/,/^$/s/^  \([a-z]\+\) .*/\1/p')
mapfile -t mechanisms < <("$heed" list --json | sed -n 's/^    "name": "\(.*\)",/\1/p')
((${#commands[@]} >= 9 && ${#mechanisms[@]} >= 4))
offers "heed " "${commands[@]}"
offers "heed compare model.gguf --mechanism " "${mechanisms[@]}"
offers "heed explain mob" moba
offers "heed compare --mechanism moba:" block= top_k= sink= tie=
offers "heed compare --mechanism moba:block=64,to" 64,top_k=
offers "heed compare --pass" --passkey-length --passkey-depths
offers "heed run --dtype b" bf16
offers "heed bench attend --against " torch
offers "heed bench decode model.gguf --against l" llama.cpp
offers "heed run --file anything"
