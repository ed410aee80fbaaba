"""From images and prompts to masks: single images, batches, whole images and volumes."""
