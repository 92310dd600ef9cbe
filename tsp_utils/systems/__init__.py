"""What others do with the same features: their losses, their heads, fine-tuning."""
