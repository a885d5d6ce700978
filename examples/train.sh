#!/usr/bin/env bash
# Trains a small model on a text, stops half way, goes on, and lets heed run it.
#   examples/train.sh TEXT FOLDER
set -euo pipefail
cd "$(dirname "$0")/.."
text=${1:?expected a text} folder=${2:?expected a folder for the model}
heed=build/bin/heed

"$heed" train --config examples/train.json --file "$text" --out "$folder" --steps 100
"$heed" train --resume "$folder" --steps 200
"$heed" run "$folder/model.gguf" --prompt "And God said" --mechanism moba:block=32,top_k=4 --layers 0-2 -n 100
