#!lua name=inferpipe_events_v1
-- Events of applications. The keys stand at the top of redis_functions.lua. All of one topic (a
-- workspace's events of one name: its log, its subscribers, the ids it has seen) is in one
-- partition, so that each function below is one atomic step there. Times are the server's own.
--
-- An event is accepted here by `publish`: its id is noted for a day, it goes into the log, and one
-- message for whoever carries it out goes into the outbox, which is the queue: it stays there until
-- all that follows from the event has been done. A worker is told at once; what it leaves by dying,
-- the next heartbeat of another finds.

local SEEN_TTL_MS = 86400000   -- the same id within it is the same event

local function now_ms()
  local t = redis.call('TIME')
  return tonumber(t[1]) * 1000 + math.floor(tonumber(t[2]) / 1000)
end

local function text(n)
  return string.format('%.0f', n)
end

local function post(p, id, log, body)
  redis.call('XADD', p .. ':outbox', '*', 'm', id, 't', string.match(p, '{(%d+)}') .. ':' .. log, 'b', body)
end

-- One live worker is told that the outbox has something; which one goes round with the time.
local function nudge(p, now)
  local workers = redis.call('ZRANGEBYSCORE', p .. ':workers', '(' .. text(now), '+inf', 'LIMIT', 0, 64)
  if #workers == 0 then return end
  redis.call('SPUBLISH', p .. ':w:' .. workers[now % #workers + 1], cmsgpack.pack({'relay'}))
end

-- publish: message_id "event:<ws>:<name>" body kept_max retention_ms [outbox_max]
-- -> 1 when it is new here, 0 when it was sent before, -1 when too many wait already
local function publish(keys, args)
  local p, now = keys[1], now_ms()
  local ws, name = string.match(args[2], '^event:([^:]*):(.*)$')
  if redis.call('ZSCORE', p .. ':seen', args[1]) then return 0 end
  if args[6] and redis.call('XLEN', p .. ':outbox') >= tonumber(args[6]) then return -1 end
  redis.call('ZADD', p .. ':seen', text(now), args[1])
  redis.call('ZREMRANGEBYSCORE', p .. ':seen', '-inf', text(now - SEEN_TTL_MS))
  redis.call('PEXPIRE', p .. ':seen', SEEN_TTL_MS)
  local log = p .. ':ev:' .. ws
  redis.call('XADD', log, 'MAXLEN', '~', args[4], '*', 'n', name, 'b', args[3])
  redis.call('XTRIM', log, 'MINID', '~', text(now - tonumber(args[5])))
  redis.call('PEXPIRE', log, args[5])
  post(p, args[1] .. '/out', 'event.out', args[3])
  nudge(p, now)
  return 1
end

redis.register_function('ip1_publish', publish)
