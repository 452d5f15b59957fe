#!lua name=inferpipe_events_v1
-- Events of applications. The keys stand at the top of redis_functions.lua. All of one topic (a
-- workspace's events of one name: its log, its subscribers, the ids it has seen) is in one
-- partition, so that each function below is one atomic step there. Times are the server's own.
--
-- An event is accepted here by `publish`: its id is noted for a day, it goes into the log, and one
-- message for whoever carries it out goes into the outbox, which is the queue: it stays there until
-- all that follows from the event has been done. A worker is told at once; what it leaves by dying,
-- the next heartbeat of another finds.

local LOOK_BACK_MAX = 1000     -- events that came while a subscription was on its way
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

-- subscribe: message_id "event.sub:<ws>:<name>" body since_ms -> 1 when it is new here
-- What came between the moment it left its execution and now was carried out without it.
local function subscribe(keys, args)
  local p, now = keys[1], now_ms()
  if redis.call('ZADD', p .. ':seen', 'NX', text(now), args[1]) == 0 then return 0 end
  local ws, name = string.match(args[2], '^event.sub:([^:]*):(.*)$')
  local message = cjson.decode(args[3])
  local key = p .. ':sub:' .. ws .. ':' .. name
  redis.call('HSET', key, message.who, args[4])
  local ttl = message.until_ms - now + SEEN_TTL_MS
  if redis.call('PTTL', key) < ttl then redis.call('PEXPIRE', key, text(ttl)) end
  for _, entry in ipairs(redis.call('XRANGE', p .. ':ev:' .. ws, args[4], '+', 'COUNT', LOOK_BACK_MAX)) do
    if entry[2][2] == name then
      local body = '{"who":' .. cjson.encode(message.who) .. ',"event":' .. entry[2][4] .. '}'
      post(p, args[1] .. '/' .. entry[1], 'event.heard', body)
      nudge(p, now)
    end
  end
  return 1
end

-- unsubscribe: message_id "event.unsub:<ws>:<name>" body -> 1 when it was there
local function unsubscribe(keys, args)
  local ws, name = string.match(args[2], '^event.unsub:([^:]*):(.*)$')
  return redis.call('HDEL', keys[1] .. ':sub:' .. ws .. ':' .. name, cjson.decode(args[3]).who)
end

redis.register_function('ip1_publish', publish)
redis.register_function('ip1_subscribe', subscribe)
redis.register_function('ip1_unsubscribe', unsubscribe)
