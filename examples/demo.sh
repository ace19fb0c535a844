#!/usr/bin/env bash
# Demo with the real SmolLM2-135M-Instruct: ask questions, fine-tune, ask again. All files are written below .demo/.
set -euo pipefail
cd "$(dirname "$0")/.."
export SAGE_HOME="$PWD/.demo"
SAGE_GATEWAY_PORT=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
export SAGE_GATEWAY_PORT
model=smollm2-135m-instruct
adapter="$SAGE_HOME/adapter"
questions=("Introduce yourself in one sentence." "What is SAGE?" "How do I list engines in SAGE?")
began=$SECONDS
say() { printf '\n\033[1m%s\033[0m\n' "$*"; }
leave() {
  for engine in "${engines[@]}"; do sage llm engine stop "$engine" >/dev/null 2>&1 || true; done
  sage gateway stop >/dev/null 2>&1 || true
}
engines=()
trap leave EXIT
rm -rf "$adapter"

ask() { # ask MODEL FILE: write one answer per line to FILE, with greedy decoding
  for question in "${questions[@]}"; do
    sage llm chat "$1" --message "$question" --temperature 0 --max-tokens 60 | tr '\n' ' '
    echo
  done >"$2"
}

say "1. Serve the base model and ask it three questions"
base=$(sage llm engine start "$model" --name base)
engines+=("$base")
ask base "$SAGE_HOME/before.txt"
sage llm engine stop "$base"

say "2. Fine-tune it on 92 chats about SAGE"
run=$(sage llm engine start "$model" --engine-kind finetune --output "$adapter" --learning-rate 2e-3 \
  --dataset examples/data/sample_train.jsonl --eval examples/data/sample_eval.jsonl)
engines+=("$run")
sage llm engine list
sage llm engine logs "$run" --follow --tail 1
sage llm engine status "$run" | grep -E '^(state|step|loss|held-out|tokens)'

say "3. Serve the result and ask it the same"
tuned=$(sage llm engine start "$adapter" --name tuned)
engines+=("$tuned")
ask tuned "$SAGE_HOME/after.txt"

for i in "${!questions[@]}"; do
  say "${questions[$i]}"
  printf '  before: %s\n  after:  %s\n' "$(sed -n "$((i + 1))p" "$SAGE_HOME/before.txt")" "$(sed -n "$((i + 1))p" "$SAGE_HOME/after.txt")"
done
say "Done in $((SECONDS - began)) s. The adapter is in $adapter; \`SAGE_HOME=$SAGE_HOME sage llm engine start $adapter\` serves it again."
