"""Supervised fine-tuning from Python: question and answer rows, packed, on any machine.

    python examples/sft.py MODEL rows.jsonl

`rows.jsonl` holds one JSON object per line with "prompt" and "completion" (or "messages", or "text").
"""

import sys

from datasets import load_dataset

from fastalign import SFTConfig, SFTTrainer

model, data = sys.argv[1:3]
trainer = SFTTrainer(
    model=model,
    args=SFTConfig(output_dir="runs/sft", packing=True, max_length=1024, num_train_epochs=1, learning_rate=2e-5),
    train_dataset=load_dataset("json", data_files=data, split="train"),
)
trainer.train()
trainer.save_model()
trainer.save_state()
print("Model: runs/sft; curves: fastalign report runs/sft")
