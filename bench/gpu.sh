#!/bin/sh
# Everything that is to be measured on one GPU of 80 GB, in one go; figures go to bench/results-gpu/.
# Targets are for an H100: decoding at batch 1 by graphs at 60% of the bandwidth or more, half depth at an efficiency of
# 0.85, 5,000 tokens/s at batch 64, 40 tokens/s without graphs; stage 1 at 8,000 tokens/s.
set -e
cd "$(dirname "$0")/.."
out=bench/results-gpu
mkdir -p $out
CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0} python -m pytest -q -k on_cuda  # else the figures are of something wrong
for shape in qwen3-4b r1-distill-1.5b; do
    python bench/dry_run.py --shape $shape --prompt 150 --new 2048 --prompts 4 --samples 8 > $out/dry-run-$shape.txt
    cat $out/dry-run-$shape.txt
done
for way in "" "--cuda-graphs"; do
    python bench/decode.py --shape qwen3-4b --batch 1 64 --new 64 $way --out $out/decode$way.json
    python bench/decode.py --shape qwen3-4b --grow $way --out $out/decode-grow$way.json
    python bench/rollout.py --shape qwen3-4b --prompts 32 --samples 8 --rows 64 --new 256 $way --out $out/rollout$way.json
done
python bench/train.py --shape qwen3-4b --batch 4 --length 2048 --out $out/train.json
python bench/train.py --shape qwen3-4b --batch 1 --length 4096 --recompute --out $out/train-recompute.json
python bench/train.py --shape qwen3-4b --memory 512 4096 16384 --out $out/memory.json
CUDA_VISIBLE_DEVICES= python -m pytest -q
