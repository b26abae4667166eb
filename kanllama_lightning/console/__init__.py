"""What a command shows and hears: signals, progress, secrets kept, one line at its end."""
