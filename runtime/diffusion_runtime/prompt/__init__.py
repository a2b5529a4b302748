"""From a prompt to what the UNet attends to."""
