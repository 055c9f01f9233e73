"""The neutral technique: counts calls and bytes, and changes nothing. What a technique looks like at its smallest."""
