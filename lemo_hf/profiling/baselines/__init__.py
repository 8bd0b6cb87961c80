"""What LeMo is compared with: other ways to spend less on long sequences, each written from its paper's description."""
