"""A score model fitted from preferences, measured on prompts that it did not see."""
