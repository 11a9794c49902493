"""The leaderboard of the router benchmark: a page, its pictures and the record of rows that both follow from."""
