"""Fast post-training of language models through the interface of TRL."""
