# The integration test in the requirement. Only the port differs. $BETWEEN: commands between the steps 3 and 4.
# 1. Start fine-tune
ENGINE_ID=$(sage llm engine start Qwen/Qwen2.5-0.5B-Instruct \
  --engine-kind finetune \
  --dataset ./examples/data/sample_train.jsonl \
  --output ./test_finetune \
  --num-epochs 1 \
  | grep -oP 'engine-\w+')

# 2. Monitor progress
sage llm engine list  # Should show "running", progress%

# 3. View logs
sage llm engine logs $ENGINE_ID --tail 20

$BETWEEN

# 4. Stop (or wait for completion)
sage llm engine stop $ENGINE_ID  # Saves checkpoint

# 5. Load fine-tuned model
sage llm engine start ./test_finetune --engine-kind llm

# 6. Verify inference works
curl -X POST http://localhost:$SAGE_GATEWAY_PORT/v1/chat/completions \
  -H "Content-Type: application/json" \
  -d '{"model":"sage-default","messages":[{"role":"user","content":"test"}]}'
