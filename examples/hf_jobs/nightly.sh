#!/bin/bash
# One night on a machine of the Hub: what lasts longer than the night is in the folder $STATE. More arguments are train_transformer.py's.
set -e
suite="${TMPDIR:-/tmp}/suite" # a copy, because the job sees the suite read-only, and the default text is made inside it
mkdir "$suite"
cp -R "$(dirname "$0")/../../." "$suite"
chmod -R u+w "$suite"
cd "$suite"
pip install --quiet -r requirements_transformer.txt
python train_transformer.py --mode train --model_path "${STATE:-/state}/nightly.pth" --max_minutes 60 --push_to_hf "$@"
