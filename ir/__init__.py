"""What a program is: values, text, meaning, cost.  Imports no torch."""
