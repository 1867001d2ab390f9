"""What a lesson shows: plots, pictures, tables and listings of source."""
