#!/bin/bash
# One night on a machine of the Hub: what lasts longer than the night is in the folder $STATE. More arguments are train_transformer.py's.
set -e
cd "$(dirname "$0")/../.."
pip install --quiet -r requirements_transformer.txt
python train_transformer.py --mode train --model_path "${STATE:-/state}/nightly.pth" --max_minutes 60 --push_to_hf "$@"
