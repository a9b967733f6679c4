"""Fine-tune Phi-3-Vision on your own pictures."""
