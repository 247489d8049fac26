"""What happens beside the data."""
