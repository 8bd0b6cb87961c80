"""What a run leaves behind for others: adapter companions, exports, model cards."""
