"""Objects: values, where they are, who holds them, and how they become bytes."""
