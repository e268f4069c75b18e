"""What goes into the scripts: prompts, images with captions, and artifact labels."""
