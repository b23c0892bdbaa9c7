"""Who holds which elements of which parameter, and who needs to know: layouts, their readers, and the exchange."""
