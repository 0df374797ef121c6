"""Images from a checkpoint: to look at a LoRA, and as the data of a teacher for direct_distill."""
