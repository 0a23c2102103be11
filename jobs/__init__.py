"""All that is true of a job whichever process looks at it: its row, its states, its files, its bell."""
