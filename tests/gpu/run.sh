#!/usr/bin/env bash
# All that needs an NVIDIA GPU, in the project's root: bash tests/gpu/run.sh [FOLDER] [PART...]; its results land in FOLDER (out/gpu).
# After `pip install -e '.[test]' -r tests/parity/requirements.txt` with a CUDA build of PyTorch. Each of their commands ends within ten minutes:
# tests    CUDA beside the CPU in float32, float16 and bfloat16; waits; a compiled run; cards of 8, 12 and 24 GB
# eager    CFG, S-CFG and the paper's beside diffusers' CFG step, and the peaks of their memory
# compiled the same, ours as one graph and diffusers' network compiled
set -uo pipefail
folder=${1:-out/gpu}
shift || true
parts=${*:-tests eager compiled}
mkdir -p "$folder"
failed=0

log() { # NAME COMMAND...: at most ten minutes
    echo "=== $1"
    timeout 600 "${@:2}" > "$folder/$1.log" 2>&1 || { echo "ended with status $?, 124 after ten minutes" && failed=1; }
    tail -n 20 "$folder/$1.log"
}

steps() { # NAME OPTIONS...
    log "$1" python tests/benchmarks/step.py steps --device cuda --output "$folder/$1.json" "${@:2}"
}

python -c "import torch; print(torch.__version__, torch.cuda.get_device_name())" || exit 2
for part in $parts; do
    case $part in
    tests) log tests python -m pytest -q -rsP tests/gpu ;;
    eager)
        steps sd1-512 --side 64
        steps sd1-1024 --side 128
        steps sdxl-1024 --family sdxl
        log memory python tests/benchmarks/step.py memory --device cuda --output "$folder/memory.json"
        ;;
    compiled)
        steps sd1-512-compiled --side 64 --compile
        steps sd1-1024-compiled --side 128 --compile
        steps sdxl-1024-compiled --family sdxl --compile
        ;;
    *) echo "no part $part: there is tests, eager, compiled" >&2 && exit 2 ;;
    esac
done
exit $failed
