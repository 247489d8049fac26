"""What happens to what clients sent."""
