"""What the Hub shows of a folder: README.md of merged and fine-tuned models, of profiles and masks."""
